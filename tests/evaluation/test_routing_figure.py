"""The routing figure is drawn for every shape of run, with the panels that it has something for."""

import json
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from jmoe.evaluation import routing_figure
from jmoe.evaluation.routing_figure import plot_routing

ALWAYS = ["Busiest expert / mean load", "Router entropy (nats)", "Load per expert / mean"]
NUCLEUS = ["Experts per token", "Experts of a token, % of tokens"]


def routing(experts: list[int], rng, nucleus=True, **more):
    """A record's routing: nucleus layers, or top-1."""
    loads = [rng.dirichlet(np.full(count, 5.0)) for count in experts]
    histograms = [[0.0, 0.25, 0.5, 0.25] if nucleus else [0.0, 1.0] for _ in experts]
    return {
        "experts_per_token": 2.0,
        "activated_parameters": 1.2e6,
        "parameters": 34_567_890,
        "activated_flops_per_token": 7.2e6,
        "flops_per_token": 2.1e8,
        "moe_layers": list(range(len(experts))),
        "experts_per_token_by_layer": [2.0 + 0.1 * i for i in range(len(experts))],
        "experts_per_token_histogram_by_layer": histograms,
        "dropped_per_token_by_layer": [0.0] * len(experts),
        "load_by_layer": [load.tolist() for load in loads],
        "load_max_over_mean_by_layer": [load.max() * len(load) for load in loads],
        "dead_experts_by_layer": [0] * len(experts),
        "router_entropy_by_layer": [1.0] * len(experts),
        **more,
    }


def write(path, experts: list[int], steps: list[int], **more):
    rng = np.random.default_rng(0)
    with path.open("w") as stream:
        for step in steps:
            train = {"step": step, "split": "train", "loss": 3.0, **(routing(experts, rng, **more) if experts else {})}
            for record in (train, {"step": step, "split": "validation", "loss": 3.0}):
                stream.write(json.dumps(record) + "\n")


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws metrics.jsonl; the figure."""
    figures = []

    def keep(*args, **kwargs):
        figures.append(Figure(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(routing_figure, "Figure", keep)

    def draw() -> Figure:
        assert plot_routing(tmp_path / "metrics.jsonl", tmp_path / "routing.png")
        picture = imread(tmp_path / "routing.png")
        assert picture.shape[1] == 1400 and picture.shape[0] > 500
        assert len(np.unique(picture.reshape(-1, picture.shape[2])[::29], axis=0)) > 30
        return figures[-1]

    return draw


def titles(figure: Figure) -> list[str]:
    return [title.split(", step")[0] for axes in figure.axes if (title := axes.get_title(loc="left"))]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize(
    ("experts", "steps", "more", "panels"),
    [
        ([4, 4], [1, 10, 20], {"moe_layers": [1, 3]}, NUCLEUS),
        ([64] * 24, [1, 1000, 100_000], {}, NUCLEUS),
        ([16] * 8, [1], {}, NUCLEUS),
        ([16, 8], [10, 20], {"nucleus_p_by_layer": [None, 0.3]}, [*NUCLEUS, "Nucleus threshold p"]),
        ([8], [10, 20], {"dropped_per_token_by_layer": [0.1]}, [*NUCLEUS, "Dropped per token"]),
        ([1], [10, 20], {"nucleus": False}, []),
        (
            [8, 8],
            [10, 20],
            {"nucleus": False, "router_bias_range_by_layer": [0.0125, 0.5]},
            ["Router bias, highest − lowest"],
        ),
    ],
    ids=["two layers", "many", "one logged step", "unlike layers", "one layer", "one expert", "top-k with bias"],
)
def test_a_picture_has_the_panels_of_its_run(tmp_path, draw, experts, steps, more, panels):
    write(tmp_path / "metrics.jsonl", experts, steps, **more)
    figure = draw()
    assert sorted(titles(figure)) == sorted([*ALWAYS, *panels])
    facts = texts(figure)[: 8 + 2 * len(set(panels) - set(NUCLEUS))]
    assert facts[2:8] == [
        *("1.2M of 34.6M", "parameters activated", "7.2M of 210.0M", "training FLOPs per token"),
        *(f"0 of {sum(experts):,}", "dead experts"),
    ]
    if "router_bias_range_by_layer" in more:
        assert facts[8:] == ["0.013–0.5", "bias range"]
    assert "matplotlib.pyplot" not in sys.modules


def test_dead_experts_are_crossed_out(tmp_path, draw):
    load = {"load_by_layer": [[0.0, 0.5, 0.0, 0.5]], "dead_experts_by_layer": [2]}
    write(tmp_path / "metrics.jsonl", [4], [1, 2], **load)
    assert [text for text in texts(draw()) if text in ("×", "2.0")] == ["×", "2.0", "×", "2.0"]


def test_without_moe_layers_nothing_is_written(tmp_path):
    write(tmp_path / "metrics.jsonl", [], [1, 2])
    assert not plot_routing(tmp_path / "metrics.jsonl", tmp_path / "routing.png")
    (tmp_path / "metrics.jsonl").write_text("")
    assert not plot_routing(tmp_path / "metrics.jsonl", tmp_path / "routing.png")
    assert not (tmp_path / "routing.png").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("experts_per_token", "Infinity"), ("router_entropy", "NaN"), ("load_max_over_mean", 0.0)]
)
def test_a_step_that_was_not_finite_or_had_no_token_is_left_out(tmp_path, draw, name, value):
    write(tmp_path / "metrics.jsonl", [4, 4], [1])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        broken = routing([4, 4], np.random.default_rng(0), **{f"{name}_by_layer": [value, 1.0]})
        stream.write(json.dumps({"step": 2, "split": "train", **broken}) + "\n")
    assert draw().axes[1].lines[0].get_xdata().tolist() == [1]


def test_of_a_long_log_a_part_is_read_with_the_latest_step(tmp_path, draw, monkeypatch):
    monkeypatch.setattr(routing_figure, "LINES", 20)
    write(tmp_path / "metrics.jsonl", [4], [*range(1, 101)])
    steps = draw().axes[1].lines[0].get_xdata()
    assert steps[-1] == 100 and 15 <= len(steps) <= 20 and len(set(np.diff(steps))) == 1
