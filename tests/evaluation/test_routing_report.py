"""The routing figure is drawn for every shape of run, and the table tells the right figures."""

import json
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from jmoe.evaluation.routing_report import plot_routing, routing_table


def write(path, experts: list[int], steps: list[int], **more):
    rng = np.random.default_rng(0)
    with path.open("w") as stream:
        for step in steps:
            loads = [rng.dirichlet(np.full(count, 5.0)).tolist() for count in experts]
            routing = {
                "experts_per_token_by_layer": [2.0 + 0.1 * i for i in range(len(experts))],
                "load_by_layer": loads,
            }
            train = {"step": step, "split": "train", "loss": 3.0, **(routing if experts else {}), **more}
            for record in (train, {"step": step, "split": "validation", "loss": 3.0}):
                stream.write(json.dumps(record) + "\n")


@pytest.mark.parametrize(
    ("experts", "steps", "more"),
    [
        ([4, 4], [1, 10, 20], {"moe_layers": [1, 3]}),
        ([64] * 24, [1, 1000, 100_000], {}),
        ([16] * 8, [1], {}),
        ([16, 8, 16], [10, 20], {}),
        ([8], [10, 20], {}),
        ([1], [10, 20], {}),
    ],
    ids=["two layers", "many", "one logged step", "unlike layers", "one layer", "one expert"],
)
def test_a_picture_is_drawn(tmp_path, experts, steps, more):
    write(tmp_path / "metrics.jsonl", experts, steps, **more)
    assert plot_routing(tmp_path / "metrics.jsonl", tmp_path / "routing.png", num_experts_active_max=7)
    picture = imread(tmp_path / "routing.png")
    assert picture.shape[1] == 1400 and picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50
    assert "matplotlib.pyplot" not in sys.modules


def test_without_moe_layers_nothing_is_written(tmp_path):
    write(tmp_path / "metrics.jsonl", [], [1, 2])
    assert not plot_routing(tmp_path / "metrics.jsonl", tmp_path / "routing.png")
    (tmp_path / "metrics.jsonl").write_text("")
    assert not plot_routing(tmp_path / "metrics.jsonl", tmp_path / "routing.png")
    assert not (tmp_path / "routing.png").exists()


def test_a_step_that_was_not_finite_is_left_out(tmp_path):
    write(tmp_path / "metrics.jsonl", [4, 4], [1])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        broken = {"experts_per_token_by_layer": ["NaN", 1.0], "load_by_layer": [["NaN"] * 4, [0.25] * 4]}
        stream.write(json.dumps({"step": 2, "split": "train", **broken}) + "\n")
    assert plot_routing(tmp_path / "metrics.jsonl", tmp_path / "routing.png")


def test_the_table():
    routing = {
        "moe_layers": [1, 3],
        "experts_per_token_by_layer": [2.5, 1.25],
        "load_by_layer": [[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]],
    }
    assert routing_table(routing).splitlines() == [
        "layer  experts/token  load max/mean  load CV  dead experts",
        "    1           2.50           1.00     0.00        0 of 4",
        "    3           1.25           2.00     1.00        2 of 4",
        " mean           1.88           1.50     0.50           1.0",
    ]
    assert routing_table({"loss": 1.0}) == ""
