"""Averages of checkpoints: their weights, the average, and the run directory it is written to."""

import jax
import numpy as np
import pytest

import jmoe
from jmoe import merge, recipe, sharding, training
from jmoe.checkpoint import Checkpoints
from jmoe.config import Config, Data, Dense, InputError, LayerGroup, Model, MoE, TopK
from jmoe.data import tokenizer
from jmoe.merge import Options, Rule, merge_weights
from jmoe.run_directory import RunDirectory

LAYERS = (LayerGroup((Dense(d_ff=8), MoE(4, 8, TopK(2, score="sigmoid", bias_rate=0.1)))),)
SHAPE = Model(257, 16, num_heads=2, num_kv_heads=1, head_dim=8, layers=LAYERS)
SETTINGS = Config(model=SHAPE, data=Data(seq_len=32))
STEPS = (10, 20, 40)
RULES = ("uniform", "wsm-linear", "wsm-1-sqrt", "wsm-cosine", "ema")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [STEPS, (3, 4), tuple(range(0, 1000, 10))])
def test_weights_are_shares(rule, steps):
    weights = merge_weights(steps, rule)
    assert len(weights) == len(steps) and weights.min() >= 0
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)


def test_weights_by_hand():
    """Of a decay over [0, 1], w_i is the mean between two checkpoints: 7/8, 5/8, 3/8, 1/8 of a linear one in quarters,
    and of 1 − √x its integral."""
    np.testing.assert_allclose(merge_weights((0, 1, 2, 3, 4), "wsm-linear"), [1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8])
    np.testing.assert_allclose(merge_weights((0, 1, 4), "wsm-linear"), [1 / 8, 1 / 2, 3 / 8])
    x = np.linspace(0, 1, 300_001)
    shapes: dict[Rule, np.ndarray] = {"wsm-1-sqrt": 1 - np.sqrt(x), "wsm-cosine": (1 + np.cos(np.pi * x)) / 2}
    for rule, shape in shapes.items():
        first, second = shape[:100_001].mean(), shape[100_000:].mean()
        np.testing.assert_allclose(merge_weights((10, 20, 40), rule), [1 - first, first - second, second], atol=1e-5)
    np.testing.assert_allclose(merge_weights((1, 2, 3), "ema", 0.9), [0.81, 0.09, 0.1])


@pytest.mark.parametrize("rule", ["wsm-linear", "wsm-1-sqrt", "wsm-cosine"])
def test_an_average_with_wsm_weights_is_a_run_whose_updates_decayed(rule):
    """With a checkpoint after every step: the sum of the updates, each times the decay at its time."""
    updates = np.random.default_rng(0).normal(size=200)
    points = np.concatenate([[0.0], np.cumsum(updates)])
    middles = (np.arange(200) + 0.5) / 200
    shape = {
        "wsm-linear": 1 - middles,
        "wsm-1-sqrt": 1 - np.sqrt(middles),
        "wsm-cosine": (1 + np.cos(np.pi * middles)) / 2,
    }
    np.testing.assert_allclose(merge_weights(range(201), rule) @ points, shape[rule] @ updates, atol=0.02)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of three checkpoints, each the first one's parameters, router bias included, plus noise of its own."""
    with RunDirectory.open(tmp_path_factory.mktemp("run")) as run:
        run.write_config(recipe.to_dict(SETTINGS))
        tokenizer.load(SETTINGS.data).save(run.tokenizer)
        checkpoints = Checkpoints(run.checkpoints, keep=9)
        state = training.create_state(SETTINGS, sharding.make_mesh(SETTINGS.mesh, jax.devices()[:1]))
        for step in STEPS:
            rng = np.random.default_rng(step)
            moved = jax.tree.map(lambda x, rng=rng: x + rng.normal(size=x.shape).astype(x.dtype), state.params)
            items = training.checkpoint_items(state._replace(params=moved), {"tokenizer": "t"})
            checkpoints.save(step, items, metadata={"fingerprints": {"tokenizer": "t"}})
        checkpoints.close()
    return run.path


@pytest.mark.parametrize("rule", ["uniform", "wsm-1-sqrt"])
def test_the_average_is_that_by_hand(run_dir, tmp_path, rule, capsys):
    out = tmp_path / "merged"
    assert merge.main([str(run_dir), *map(str, STEPS), "--out", str(out), "--weights", rule]) == 0
    weights = merge_weights(STEPS, rule)
    assert f"step        40  weight {weights[-1]:.6f}\n" in capsys.readouterr().out
    merged, parts = jmoe.load(out), [jmoe.load(run_dir, step=step).params for step in STEPS]
    assert (merged.step, merged.settings, merged.fingerprints) == (40, SETTINGS, {"tokenizer": "t"})

    def by_hand(got, *each):
        want = sum(w * np.asarray(x, np.float64) for w, x in zip(weights, each, strict=True))
        np.testing.assert_array_equal(got, np.asarray(want).astype(np.float32))

    jax.tree.map(by_hand, merged.params, *parts)
    bias = merged.params.layers[0][1].feed_forward.router.bias[...]
    assert np.abs(bias).max() > 0.1
    told = Checkpoints(out / "checkpoints", keep=1).metadata(40)["merged"]
    assert told == {"run": str(run_dir), "weights": dict(zip(map(str, STEPS), weights.tolist(), strict=True))}
    assert merged.logits(np.zeros((1, 4), np.int32)).shape == (1, 4, 257)


@pytest.mark.parametrize(
    "arguments, line",
    [
        ("10", "an average takes two or more steps, not 1; .* has checkpoints of steps 10, 20, 40$"),
        ("20 10", "steps 20 10 must ascend, each named once"),
        ("10 10", "steps 10 10 must ascend, each named once"),
        ("10 30 50", "there is no checkpoint of step 30; .* has checkpoints of steps 10, 20, 40$"),
        ("10 x", "'x' is no step; after the run come the steps of its checkpoints, then flags"),
        ("10 20 --weights best", "must be uniform, wsm-linear, wsm-1-sqrt, wsm-cosine or ema"),
        ("10 20 --ema-decay 1", "ema_decay is 1.0; it must lie in"),
        ("10 20", "--out is missing: the run directory to write"),
        ("10 20 --out .", ". is there already; give a folder that is not, or is empty"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(run_dir, arguments, line):
    with pytest.raises(InputError, match=line) as error:
        merge.main([str(run_dir), *arguments.split()])
    assert "\n" not in str(error.value)


def test_no_run_and_a_damaged_checkpoint(run_dir, tmp_path):
    with pytest.raises(InputError, match="is no run directory: it has no config.json"):
        merge.main([str(tmp_path), "10", "20", "--out", str(tmp_path / "out")])
    file = max((run_dir / "checkpoints" / "20" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    try:
        with pytest.raises(merge.CheckpointError, match="step 20 in .* bytes"):
            merge.merge(run_dir, STEPS, Options(out=str(tmp_path / "out")))
    finally:
        file.write_bytes(whole)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_average_is_evaluated(trained, scripts, tmp_path):
    out = tmp_path / "merged"
    merge.merge(trained[0], (16, 20, 24), Options(out=str(out)))
    code, printed, err = scripts.run("eval.py", out)
    assert (code, err) == (0, "")
    assert printed.startswith(f"{out}, step 24, ") and (out / "eval.json").exists()
