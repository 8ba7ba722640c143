"""The train step: the same numbers on any mesh and for any accumulation, and its promises about state."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config, recipe, sharding, training
from jmoe.batch import Batch
from jmoe.model.transformer import router_states

B, S, V, STEPS = 16, 32, 128, 3

STEERED = config.MoE(8, 32, config.Nucleus(0.4, max_slots=4, experts_per_token=2.5), widths="hybrid")
BALANCED = config.MoE(
    8,
    16,
    config.TopK(2, score="sigmoid", groups=2, scale=1.5, bias_rate=0.01),
    identity_experts=2,
    shared_d_ff=16,
    shared_gate=True,
)
MODEL = config.Model(
    vocab_size=V,
    d_model=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    init_std=0.1,
    layers=(config.LayerGroup((STEERED, BALANCED), repeats=2),),
)
SETTINGS = config.Config(
    model=MODEL,
    batch_size=B,
    steps=STEPS,
    optim=config.AdamW(learning_rate=1e-2, schedule=config.Constant(warmup_steps=0), eps=1e-4),
    loss=config.Loss(
        load_balance_loss=0.1,
        sequence_balance_loss=0.05,
        router_z_loss=0.02,
        dynamic_loss=0.01,
        parameter_penalty=0.03,
        z_loss=1e-3,
        chunk_tokens=B * 8,
    ),
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


@cache
def compiled(settings):
    """The mesh and the train step; tests of the same settings share the compilation."""
    mesh = sharding.make_mesh(settings.mesh)
    return mesh, training.make_train_step(settings, mesh)


def run(settings):
    """The described metrics of each step, and the last state on the host."""
    mesh, step = compiled(settings)
    state = training.create_state(settings, mesh)
    described = []
    for batch in BATCHES:
        state, metrics = step(state, training.put_batch(batch, mesh))
        described.append(training.describe(settings, metrics))
        jax.tree.map(assert_copies_agree, (state._replace(key=None), metrics))
    return described, jax.tree.map(np.asarray, (state.params, state.opt_state))


def assert_copies_agree(array):
    """Shards that hold the same part of an array are equal: nothing is labelled replicated that is not."""
    seen = {}
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(seen.setdefault(str(shard.index), shard.data), shard.data)


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
    "mesh, accumulation, transport",
    [
        (config.Mesh(data=8), 1, config.Automatic()),
        (config.Mesh(data=-1), 2, config.Automatic()),
        (config.Mesh(fsdp=8), 1, config.Automatic()),
        (config.Mesh(data=2, expert=4), 1, config.AllToAll()),
        pytest.param(config.Mesh(data=2, expert=4), 2, config.AllGather(), marks=pytest.mark.slow),
        pytest.param(config.Mesh(fsdp=2, expert=2, tensor=2), 1, config.AllGather(), marks=pytest.mark.slow),
        pytest.param(config.Mesh(fsdp=2, expert=2, tensor=2), 4, config.AllToAll(), marks=pytest.mark.slow),
        pytest.param(config.Mesh(data=2, tensor=4), 4, config.Automatic(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_changes_no_number(one_device, devices, mesh, accumulation, transport):
    """Metrics within 2e-5 of their size, parameters and gradients (Adam's moments) within 1e-5, after three steps of a
    model with nucleus and top-k routers, a bias, a moving threshold, experts of different widths, and padding."""
    settings = dataclasses.replace(SETTINGS, mesh=mesh, accumulation=accumulation, transport=transport)
    assert_same_numbers(run(settings), one_device, 1e-5)


@pytest.mark.slow
def test_muon_on_a_mesh_changes_no_number(devices):
    rule = config.Muon(
        learning_rate=1e-2, schedule=config.Constant(warmup_steps=0), eps=1e-4, iteration_dtype="float32"
    )
    layers = (config.LayerGroup((config.MoE(4, 16, config.TopK(2)),), repeats=2),)
    settings = dataclasses.replace(SETTINGS, optim=rule, model=dataclasses.replace(MODEL, layers=layers))
    mesh = config.Mesh(data=2, fsdp=2, tensor=2)
    assert_same_numbers(run(dataclasses.replace(settings, mesh=mesh)), run(settings), 5e-5)


@pytest.mark.slow
def test_drops_for_want_of_capacity_are_a_metric(devices):
    settings = dataclasses.replace(SETTINGS, mesh=config.Mesh(data=2, expert=4), transport=config.AllToAll(0.25))
    for step in run(settings)[0]:
        assert min(step["dropped_per_token_by_layer"]) > 0.1
        assert np.isfinite(step["loss"])


def test_balance_is_that_of_the_whole_batch(one_device):
    """Counts of the whole batch enter the loss: the mean of the halves' own losses is another number."""
    whole = one_device[0][0]["load_balance_loss"]
    params, halves = training.init_state(SETTINGS).params, []
    gradients = jax.jit(partial(training.gradients, settings=SETTINGS))
    for rows in (slice(0, B // 2), slice(B // 2, B)):
        half = jax.tree.map(lambda x, r=rows: jnp.asarray(x[r]), BATCHES[0])
        halves.append(float(gradients(params, half)[2].scalars["load_balance_loss"]))
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

    gate = state.params.layers[0][0].feed_forward.experts.buckets[0].gate[...]
    assert gate.sharding.spec == jax.sharding.PartitionSpec(None, None, ("fsdp", "expert"), "tensor")
    assert gate.addressable_shards[0].data.shape == (2, 4, 32 // 4, 16 // 2)
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
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
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
        coefficients = dataclasses.asdict(SETTINGS.loss) | {"cross_entropy": 1.0}
        del coefficients["chunk_tokens"]
        np.testing.assert_allclose(step["loss"], sum(c * step[name] for name, c in coefficients.items()), rtol=1e-6)


def test_routers_are_moved_once_a_step_by_the_counts_of_the_whole_batch():
    """And by nothing else: no gradient, no weight decay, no count of a micro-batch."""
    settings = dataclasses.replace(SETTINGS, accumulation=4)
    mesh, step = compiled(settings)
    state = training.create_state(settings, mesh)
    for batch in BATCHES:
        ((steered, balanced),) = jax.tree.map(np.asarray, router_states(state.params))
        state, metrics = step(state, training.put_batch(batch, mesh))
        ((now_steered, now_balanced),) = jax.tree.map(np.asarray, router_states(state.params))
        ((nucleus, top_k),) = metrics.stats
        load = np.asarray(top_k.tokens_per_expert)
        moved = balanced.bias + 0.01 * np.sign(load.mean(-1, keepdims=True) - load)
        np.testing.assert_allclose(now_balanced.bias, moved - moved.mean(-1, keepdims=True), atol=1e-7)
        assert np.abs(now_balanced.bias - balanced.bias).max() > 1e-3
        mean = float(nucleus.tokens_per_expert.sum() / 2 / metrics.total.tokens)  # of the two repeats together
        np.testing.assert_allclose(now_steered.p, steered.p * np.exp(0.05 * (1 - mean / 2.5)), rtol=1e-6)


def test_the_gradient_points_down():
    """A finite difference along the gradient equals its squared norm. Every token goes to all experts: where a token
    changes experts, the loss jumps."""
    layers = (config.LayerGroup((config.MoE(4, 16, config.TopK(4)), config.MoE(2, (8, 24), config.Nucleus(1.0)))),)
    settings = dataclasses.replace(SETTINGS, model=dataclasses.replace(MODEL, layers=layers))
    params, batch = training.init_state(settings).params, jax.tree.map(jnp.asarray, BATCHES[0])
    gradients = jax.jit(partial(training.gradients, settings=settings))
    grads, _, _ = gradients(params, batch)
    squared = sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(grads))
    scale = 2e-3 / squared**0.5
    up, down = (
        gradients(jax.tree.map(lambda p, g, s=sign: p + s * scale * g, params, grads), batch)[1] for sign in (1, -1)
    )
    np.testing.assert_allclose((float(up) - float(down)) / (2 * scale), squared, rtol=2e-2)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was():
    mesh, step = compiled(SETTINGS)
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
GOLDEN = [8.247065, 8.187758, 8.081171, 7.94461, 7.82266, 7.713675, 7.654212, 7.511655, 7.482502, 7.38577]


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
