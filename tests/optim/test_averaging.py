"""The moving average of the parameters: its weights, its place in the step and in checkpoints."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import config, recipe, sharding, training
from jmoe.batch import Batch
from jmoe.checkpoint import ITEMS, Checkpoints
from jmoe.config import InputError
from jmoe.data import tokenizer
from jmoe.optim.averaging import moving_average
from jmoe.run_directory import RunDirectory

LAYERS = (config.LayerGroup((config.Dense(16),)),)
SETTINGS = config.Config(
    model=config.Model(257, 16, num_heads=2, num_kv_heads=1, head_dim=8, layers=LAYERS),
    optim=config.AdamW(learning_rate=0.1, schedule=config.Constant(0)),
    mesh=config.Mesh(fsdp=2),
    batch_size=4,
    ema=0.7,
)


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.99999])
def test_weights_fall_by_the_decay_and_sum_to_one(decay):
    values = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    average = jnp.full(3, 3.0)  # nothing of it is left
    for n, value in enumerate(values, 1):
        average = moving_average(average, jnp.asarray(value), decay, jnp.asarray(n))
        weights = decay ** np.arange(n - 1, -1, -1.0)
        np.testing.assert_allclose(average, weights / weights.sum() @ values[:n], rtol=1e-4, atol=1e-5)


def test_the_average_of_many_updates_keeps_its_small_share():
    average = moving_average(jnp.zeros(1), jnp.ones(1), 0.9999, jnp.asarray(10**6))
    np.testing.assert_allclose(average, 1e-4, rtol=1e-4)


def random_batch(seed):
    tokens = np.random.default_rng(seed).integers(0, 257, (4, 9), np.int32)
    ones = np.ones((4, 8), np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, np.arange(8, dtype=np.int32)[None] * ones, ones > 0)


def test_the_step_averages_what_it_updates_and_skipped_steps_are_none(devices):
    mesh = sharding.make_mesh(SETTINGS.mesh)
    state, step = training.create_state(SETTINGS, mesh), training.make_train_step(SETTINGS, mesh)
    specs = jax.tree.map(lambda x: x.sharding, state.params)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(specs))
    seen = []
    for seed in range(5):
        # Copies: a view of the arrays from the host would keep them from being donated.
        before = jax.tree.map(jnp.copy, state.ema)
        gain = jnp.copy(state.params.final_norm.gain[...])
        if seed == 2:  # its gradients are not finite
            state.params.final_norm.gain[...] = gain.at[0].set(jnp.nan)
        old, (state, metrics) = state, step(state, training.put_batch(random_batch(seed), mesh))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.ema))
        if seed == 2:
            assert int(metrics.scalars["skipped"]) == 1
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a + 0, b), state.ema, before)
            state.params.final_norm.gain[...] = gain
            continue
        seen.append(jax.tree.map(lambda x: np.asarray(x + 0), state.params))
        weights = 0.7 ** np.arange(len(seen) - 1, -1, -1.0)
        weights /= weights.sum()
        mean = jax.tree.map(lambda *x, w=weights: np.tensordot(w, np.stack(x), 1), *seen)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a + 0, b, rtol=1e-5, atol=1e-6), state.ema, mean)
    jax.tree.map(lambda x, want: x.sharding.is_equivalent_to(want, x.ndim) or pytest.fail(str(x)), state.ema, specs)


@pytest.fixture
def save(tmp_path):
    """Saves the state before the first step as a run; returns the run's directory."""

    def make(settings):
        mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
        state = training.create_state(settings, mesh)
        if state.ema is not None:
            state = state._replace(ema=jax.tree.map(lambda x: 2 * x, state.params))
        with RunDirectory.open(tmp_path / "run") as run:
            run.write_config(recipe.to_dict(settings))
            tokenizer.load(settings.data).save(run.tokenizer)
            checkpoints = Checkpoints(run.checkpoints, keep=1)
            checkpoints.save(1, training.checkpoint_items(state, {}), metadata={})
            checkpoints.close()
        items = training.checkpoint_items(training.abstract_state(settings, mesh), {})
        return run, state, Checkpoints(run.checkpoints, keep=1).restore(items)

    return make


def test_it_is_saved_and_loaded(save):
    run, state, restored = save(SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, training.from_checkpoint(restored[1])[0].ema, state.ema)
    jax.tree.map(np.testing.assert_array_equal, jmoe.load(run.path, ema=True).params, state.ema)
    jax.tree.map(np.testing.assert_array_equal, jmoe.load(run.path).params, state.params)


def test_without_it_nothing_is_kept(save):
    run, state, restored = save(dataclasses.replace(SETTINGS, ema=None))
    assert set(json.loads((run.checkpoints / "1" / ITEMS).read_text())) == {
        *("params", "optimizer", "random", "skipped", "data")
    }
    assert state.ema is None and training.from_checkpoint(restored[1])[0].ema is None
    with pytest.raises(InputError, match="keeps no average of its parameters: its ema is None"):
        jmoe.load(run.path, ema=True)


@pytest.mark.slow
def test_training_validates_it_and_eval_finds_the_same(scripts, tmp_path):
    run_dir = tmp_path / "run"
    code, _, err = scripts.train(run_dir, "--ema", 0.9, "--steps", 8)
    assert code == 0, err
    *_, validation = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    assert abs(validation["ema_loss"] - validation["loss"]) > 1e-3
    code, out, err = scripts.run("eval.py", run_dir, "--ema")
    assert (code, err) == (0, "")
    assert out.startswith(f"{run_dir}, step 8, moving average, ")
    found = json.loads((run_dir / "eval.json").read_text())
    assert found["ema"] is True
    for name in ("loss", "bits_per_byte"):
        assert found[name] == pytest.approx(validation[f"ema_{name}"], rel=1e-6)
