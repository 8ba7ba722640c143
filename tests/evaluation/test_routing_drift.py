"""How routing drifts: overlaps of choices, similarity of experts, when it settles, and the command over a run."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jmoe import config, recipe, routing_drift, sharding, training
from jmoe.checkpoint import Checkpoints
from jmoe.config import Dense, InputError, LayerGroup, MoE, Nucleus
from jmoe.data import tokenizer
from jmoe.evaluation.routing_drift import Drift, chance, drift_table, expert_similarity, overlap, plot_drift
from jmoe.model.transformer import Transformer
from jmoe.run_directory import RunDirectory

MIXED = MoE(5, (4, 4, 4, 8, 8), Nucleus(0.4))
MODEL = config.Model(
    257,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    init_std=0.3,
    layers=(LayerGroup((Dense(8), MIXED), repeats=2),),
)
NAN = float("nan")


def test_overlap_of_choices():
    a = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], bool)
    b = np.array([[1, 0, 1, 0], [0, 1, 1, 0]], bool)
    assert overlap(a, a) == 1.0 and overlap(a, b) == 0.75 and overlap(a, ~a) == 0.0
    assert overlap(a, np.array([[1, 0, 0, 0], [0, 0, 0, 0]], bool)) == 2 * 1 / 5
    draw = np.random.default_rng(0)
    shuffled = np.mean([overlap(a, b[draw.permutation(2)]) for _ in range(4000)])
    np.testing.assert_allclose(chance(a, b), shuffled, atol=0.02)


def test_similarity_is_the_mean_cosine_of_two_experts():
    params = Transformer(MODEL, jax.random.key(0))
    found = expert_similarity(params, MODEL)
    assert list(found) == [1, 3]
    for index, repeat in ((1, 0), (3, 1)):
        cosines = []
        for bucket in params.layers[0][1].feed_forward.experts.buckets:
            flat = [
                np.concatenate([np.ravel(m[repeat, e]) for m in (bucket.gate, bucket.up, bucket.down)])
                for e in range(bucket.gate.shape[1])
            ]
            cosines += [
                x @ y / np.linalg.norm(x) / np.linalg.norm(y) for i, x in enumerate(flat) for y in flat[i + 1 :]
            ]
        assert len(cosines) == 4
        np.testing.assert_allclose(found[index], np.mean(cosines), atol=1e-6)


def drift() -> Drift:
    """One layer that settles at step 20, one that does not."""
    with_next = np.array([[0.5, 0.95], [0.92, 0.95], [0.95, 0.8], [NAN, NAN]])
    saturation = np.array([[0.4, 0.5], [0.6, 0.7], [0.9, 0.8], [1.0, 1.0]])
    return Drift([10, 20, 30, 40], [1, 3], saturation, with_next, saturation / 4, saturation / 10)


def test_routing_has_settled_from_where_neighbours_agree():
    assert drift().settled() == [20, None]
    assert drift().settled(0.4) == [10, 10] and drift().settled(0.99) == [None, None]
    lines = drift_table(drift()).splitlines()
    assert lines[1].split() == ["layer", "10", "20", "30", "by", "chance", "last", "two", "similarity", "settled"]
    assert lines[2].split() == ["1", "0.40", "0.60", "0.90", "0.10", "0.95", "0.04", "→", "0.10", "20"]
    assert lines[3].endswith("no") and "at least 90%" in lines[-1]
    assert drift().as_json()["with_next"][-1] == [None, None]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"document {number} of text, of which there is some more. " * 4)
    data = config.Data(sources=(config.Files(f"{folder}/*.txt"),), validation_fraction=0.5, seq_len=32)
    settings = config.Config(model=MODEL, data=data)
    with RunDirectory.open(folder / "run") as run:
        run.write_config(recipe.to_dict(settings))
        tokenizer.load(settings.data).save(run.tokenizer)
        checkpoints = Checkpoints(run.checkpoints, keep=3)
        for step, seed in ((10, 0), (20, 1), (30, 1)):
            changed = dataclasses.replace(settings, seed=seed)
            state = training.create_state(changed, sharding.make_mesh(settings.mesh, jax.devices()[:1]))
            checkpoints.save(step, training.checkpoint_items(state, {}), metadata=recipe.to_dict(settings))
        checkpoints.close()
    return run.path


def test_the_command_compares_the_checkpoints_of_a_run(run_dir, capsys):
    routing_drift.main([str(run_dir), "--tokens", "100"])
    told, found = capsys.readouterr().out, json.loads((run_dir / "drift.json").read_text())
    assert drift_heading(told) == ["layer", "10", "20"]
    assert found["steps"] == [10, 20, 30] and found["moe_layers"] == [1, 3]
    assert found["saturation"][1:] == [[1.0, 1.0]] * 2 and max(found["saturation"][0]) < 0.8
    assert found["with_next"] == [found["saturation"][0], [1.0, 1.0], [None, None]]
    assert found["settled"] == [20, 20]
    assert (run_dir / "drift.png").read_bytes().startswith(b"\x89PNG")


def drift_heading(told: str) -> list[str]:
    return told.splitlines()[2].split()[:3]


def test_what_cannot_be_compared_is_one_line(run_dir):
    for flags, says in (
        (["--steps", "[10]"], "one checkpoint, and a change takes two"),
        (["--steps", "[10, 15]"], r"no checkpoint of step 15; complete steps are \[10, 20, 30\]"),
        (["--settled", "2"], "settled is 2.0"),
    ):
        with pytest.raises(InputError, match=says):
            routing_drift.main([str(run_dir), *flags])


def test_one_layer_is_drawn_too(tmp_path):
    whole = drift()
    one = whole._replace(layers=[1], **{n: getattr(whole, n)[:, :1] for n in whole._fields[2:]})
    plot_drift(one, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 10_000
