"""The train step: the same numbers on any mesh and for any accumulation, and its promises about state."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config, recipe, sharding, training
from jmoe.batch import Batch

B, S, V, STEPS = 16, 32, 128, 3

MODEL = config.Model(
    vocab_size=V,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    init_std=0.1,
    layers=(config.LayerGroup((config.MoE(8, 32, config.Nucleus(0.4)), config.MoE(4, 16, config.TopK(2))), repeats=2),),
)
SETTINGS = config.Config(
    model=MODEL,
    batch_size=B,
    steps=STEPS,
    optim=config.AdamW(learning_rate=1e-2, schedule=config.Constant(warmup_steps=0), eps=1e-4),
    loss=config.Loss(load_balance_loss=0.1, dynamic_loss=0.01, z_loss=1e-3, chunk_tokens=B * 8),
)


def random_batch(seed, rows=B, length=S, vocab=V):
    """Rows of one or two documents and some padding, tokens with Zipf's frequencies."""
    rng = np.random.default_rng(seed)
    tokens = (rng.zipf(1.3, (rows, length + 1)) % vocab).astype(np.int32)
    ends = rng.integers(length // 2, length + 2, rows)
    middles = rng.integers(1, length // 2, rows)
    at = np.arange(length + 1)
    segments = np.where(at < middles[:, None], 1, 2) * (at < ends[:, None])
    positions = np.where(segments == 2, at - middles[:, None], at) * (segments > 0)
    mask = (segments[:, :-1] > 0) & (segments[:, :-1] == segments[:, 1:])
    return Batch(
        tokens[:, :-1],
        np.where(mask, tokens[:, 1:], 0),
        segments[:, :-1].astype(np.int32),
        positions[:, :-1].astype(np.int32),
        mask,
    )


BATCHES = [random_batch(seed) for seed in range(STEPS)]


def run(settings):
    """The described metrics of each step, and the last state on the host."""
    mesh = sharding.make_mesh(settings.mesh)
    state, step = training.create_state(settings, mesh), training.make_train_step(settings, mesh)
    described = []
    for batch in BATCHES:
        state, metrics = step(state, training.put_batch(batch, mesh))
        described.append(training.describe(settings.model, metrics))
    return described, jax.tree.map(np.asarray, (state.params, state.opt_state))


@pytest.fixture(scope="module")
def one_device():
    return run(SETTINGS)


def assert_same_numbers(got, want, parameters_within):
    for step_got, step_want in zip(got[0], want[0], strict=True):
        assert step_got.keys() == step_want.keys()
        for name, value in step_want.items():
            for a, b in zip(jax.tree.leaves(step_got[name]), jax.tree.leaves(value), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=parameters_within), got[1], want[1])


@pytest.mark.parametrize("accumulation", [2, 4, 16])
def test_accumulation_changes_no_number(one_device, accumulation):
    assert_same_numbers(run(dataclasses.replace(SETTINGS, accumulation=accumulation)), one_device, 1e-5)


@pytest.mark.parametrize(
    "mesh, accumulation",
    [
        (config.Mesh(data=8), 1),
        (config.Mesh(data=-1), 2),
        (config.Mesh(fsdp=8), 1),
        pytest.param(config.Mesh(data=2, fsdp=2, expert=2), 2, marks=pytest.mark.slow),
        pytest.param(config.Mesh(fsdp=2, expert=2, tensor=2), 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_changes_no_number(one_device, devices, mesh, accumulation):
    settings = dataclasses.replace(SETTINGS, mesh=mesh, accumulation=accumulation)
    assert_same_numbers(run(settings), one_device, 1e-5)


def test_balance_is_that_of_the_whole_batch(one_device):
    """Counts of the whole batch enter the loss: the mean of the halves' own losses is another number."""
    whole = one_device[0][0]["load_balance_loss"]
    halves = []
    for rows in (slice(0, B // 2), slice(B // 2, B)):
        params = training.init_state(SETTINGS).params
        half = jax.tree.map(lambda x, r=rows: jnp.asarray(x[r]), BATCHES[0])
        halves.append(float(training.gradients(params, half, SETTINGS)[2].scalars["load_balance_loss"]))
    assert abs(np.mean(halves) - whole) > 1e-4


def test_padding_rows_change_no_number(one_device):
    nothing = jax.tree.map(np.zeros_like, BATCHES[0])
    padded = jax.tree.map(lambda *x: jnp.concatenate(x), BATCHES[0], nothing)
    params = training.init_state(SETTINGS).params
    gradients = jax.jit(partial(training.gradients, settings=SETTINGS))
    got, want = gradients(params, padded), gradients(params, jax.tree.map(jnp.asarray, BATCHES[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_the_state_is_the_same_on_any_mesh_and_stays_sharded(devices):
    """Created equal to rounding, one compile, shardings that do not drift, buffers donated."""
    settings = dataclasses.replace(SETTINGS, mesh=config.Mesh(fsdp=4, tensor=2))
    mesh = sharding.make_mesh(settings.mesh)
    state, alone = training.create_state(settings, mesh), training.init_state(SETTINGS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state.params, alone.params)

    gate = state.params.layers[0][0].feed_forward.experts.gate[...]
    assert gate.sharding.spec == jax.sharding.PartitionSpec(None, "expert", "fsdp", "tensor")
    assert gate.addressable_shards[0].data.shape == (2, 8, 32 // 4, 32 // 2)
    before = jax.tree.leaves(jax.tree.map(lambda x: x.sharding, state))
    step = training.make_train_step(settings, mesh)
    compiles = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiles.append(event) if event.endswith("backend_compile_duration") else None
    )
    compiles_so_far = []
    for batch in BATCHES:
        old = state
        state, _ = step(state, training.put_batch(batch, mesh))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
        compiles_so_far.append(len(compiles))
    assert compiles_so_far[0] >= 1 and len(set(compiles_so_far)) == 1  # the first step compiles, the others do not
    for leaf, sharding_before in zip(jax.tree.leaves(state), before, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding_before, leaf.ndim)


def test_bfloat16_trains_like_float32(one_device):
    described, (params, _) = run(dataclasses.replace(SETTINGS, dtype="bfloat16"))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    losses = [d["cross_entropy"] for d in described]
    np.testing.assert_allclose(losses, [d["cross_entropy"] for d in one_device[0]], rtol=1e-2)
    assert losses != [d["cross_entropy"] for d in one_device[0]]


def test_the_loss_is_the_sum_of_its_terms(one_device):
    for step in one_device[0]:
        expected = (
            step["cross_entropy"]
            + 1e-3 * step["z_loss"]
            + 0.1 * step["load_balance_loss"]
            + 0.01 * step["dynamic_loss"]
        )
        np.testing.assert_allclose(step["loss"], expected, rtol=1e-6)


def test_the_gradient_points_down():
    """A finite difference along the gradient equals its squared norm."""
    settings = dataclasses.replace(SETTINGS, loss=dataclasses.replace(SETTINGS.loss, load_balance_loss=0.0))
    params, batch = training.init_state(settings).params, jax.tree.map(jnp.asarray, BATCHES[0])
    gradients = jax.jit(partial(training.gradients, settings=settings))
    grads, _, _ = gradients(params, batch)
    squared = sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(grads))
    scale = 2e-3 / squared**0.5  # small, since routing jumps where a token changes experts
    up, down = (
        gradients(jax.tree.map(lambda p, g, s=sign: p + s * scale * g, params, grads), batch)[1] for sign in (1, -1)
    )
    np.testing.assert_allclose((float(up) - float(down)) / (2 * scale), squared, rtol=2e-2)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was():
    mesh = sharding.make_mesh(SETTINGS.mesh)
    step = training.make_train_step(SETTINGS, mesh)
    state = training.create_state(SETTINGS, mesh)
    state, _ = step(state, training.put_batch(BATCHES[0], mesh))
    poisoned = jax.tree.map(lambda x: x, state.params)
    poisoned.final_norm.gain[...] = poisoned.final_norm.gain[...].at[0].set(jnp.nan)
    good, bad = jax.tree.map(np.asarray, (state.params, state.opt_state)), state._replace(params=poisoned)
    kept = jax.tree.map(np.asarray, bad.params)
    for count in (1, 2):
        bad, metrics = step(bad, training.put_batch(BATCHES[1], mesh))
        assert (int(metrics.scalars["skipped"]), int(metrics.scalars["skipped_in_a_row"])) == (1, count)
    assert int(bad.step) == 3
    jax.tree.map(np.testing.assert_array_equal, bad.params, kept)
    jax.tree.map(np.testing.assert_array_equal, bad.opt_state, good[1])
    healed = bad._replace(params=jax.tree.map(jnp.asarray, good[0]))
    healed, metrics = step(healed, training.put_batch(BATCHES[1], mesh))
    assert (int(metrics.scalars["skipped"]), int(healed.skipped_in_a_row)) == (0, 0)


# Ten losses of configs/tiny.py in float32 on one device, on the rows of `random_batch`.
GOLDEN = [8.249677, 8.189602, 8.082294, 7.94606, 7.824652, 7.715386, 7.655521, 7.512765, 7.482917, 7.38647]


def test_golden_losses_of_the_tiny_recipe():
    settings = recipe.load(Path(__file__).parents[1] / "configs" / "tiny.py")
    mesh = sharding.make_mesh(settings.mesh)
    state, step = training.create_state(settings, mesh), training.make_train_step(settings, mesh)
    losses = []
    for seed in range(10):
        batch = random_batch(seed, settings.batch_size, settings.data.seq_len, settings.model.vocab_size)
        state, metrics = step(state, training.put_batch(batch, mesh))
        losses.append(float(metrics.scalars["loss"]))
    np.testing.assert_allclose(losses, GOLDEN, rtol=2e-5)
