"""QK-Clip: what is measured, what is scaled, and that it comes to the threshold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config, sharding, training
from jmoe.batch import Batch
from jmoe.config import InputError
from jmoe.loss import forward
from jmoe.ops import attention
from jmoe.optim.qk_clip import qk_clip

B, S, V = 8, 16, 64


ONE = (config.LayerGroup((config.Dense(16),)),)
TWO = (config.LayerGroup((config.Dense(16), config.Dense(8)), repeats=2),)


def settings(num_kv_heads=4, layers=ONE, **changes):
    model = config.Model(
        V, 16, num_heads=4, num_kv_heads=num_kv_heads, head_dim=8, qk_norm=False, init_std=0.5, layers=layers
    )
    optim = config.AdamW(learning_rate=1e-9, schedule=config.Constant(0), weight_decay=0.0)
    return config.Config(model=model, optim=optim, batch_size=B, qk_clip=1.0, **changes)


def batch(rows=B, seed=0):
    """Rows of two documents, of which the second ends in padding in every other row."""
    tokens = np.random.default_rng(seed).integers(0, V, (rows, S + 1), np.int32)
    segments = np.tile(np.repeat([1, 2], S // 2), (rows, 1)).astype(np.int32)
    segments[::2, 12:] = 0
    positions = np.tile(np.arange(S) % (S // 2), (rows, 1)).astype(np.int32) * (segments > 0)
    mask = segments > 0
    return jax.tree.map(jnp.asarray, Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, mask))


def measured(params, rows, of):
    return jax.jit(lambda params, rows: forward(params, rows, of)[1])(params, rows)


def by_hand(params, rows, repeat=0):
    """Highest logit of each head of the first layer, one query and key at a time, in float64."""
    layer = jax.tree.map(lambda x: np.asarray(x[repeat], np.float64), params.layers[0][0])
    x = np.asarray(params.embedding[...], np.float64)[rows.tokens]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    q, k = (np.einsum("bsd,dnh->bsnh", x, np.asarray(w)) for w in (layer.attention.query, layer.attention.key))
    angle = np.asarray(rows.positions)[:, :, None, None] * 10000.0 ** (-np.arange(4) / 4)

    def rotated(heads):
        a, b = heads[..., :4], heads[..., 4:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    q, k = rotated(q), np.repeat(rotated(k), 4 // k.shape[2], axis=2)
    logits = np.einsum("bsnh,blnh->bnsl", q, k) / np.sqrt(8)
    segments, at = np.asarray(rows.segment_ids), np.arange(S)
    seen = (segments[:, :, None] == segments[:, None]) & (at[:, None] >= at)[None] & (segments > 0)[:, :, None]
    return np.where(seen[:, None], logits, -np.inf).max((0, 2, 3))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_after_a_clip_each_clipped_heads_maximum_is_the_threshold(num_kv_heads):
    of, rows = settings(num_kv_heads), batch()
    params = training.init_state(of).params
    ((highest,),) = before = measured(params, rows, of)
    np.testing.assert_allclose(highest[0], by_hand(params, rows), rtol=1e-5)
    threshold = float(np.sort(highest[0])[1:3].mean())  # two heads are above it
    clipped = qk_clip(params, before, threshold)
    ((after,),) = measured(clipped, rows, of)
    np.testing.assert_allclose(after, np.minimum(highest, threshold), rtol=1e-5)

    query, key = (
        np.abs(np.asarray(getattr(clipped.layers[0][0].attention, name)[...]))
        / np.abs(np.asarray(getattr(params.layers[0][0].attention, name)[...]))
        for name in ("query", "key")
    )
    factor = np.minimum(1.0, threshold / np.asarray(highest))
    share = np.sqrt(factor) if num_kv_heads == 4 else factor
    np.testing.assert_allclose(query, np.broadcast_to(share[:, None, :, None], query.shape), rtol=1e-5)
    want = share[:, None, :, None] if num_kv_heads == 4 else np.ones((1, 1, 1, 1))
    np.testing.assert_allclose(key, np.broadcast_to(want, key.shape), rtol=1e-5)
    unchanged = jax.tree.map(lambda x: x, clipped)
    unchanged.layers[0][0].attention = params.layers[0][0].attention
    jax.tree.map(np.testing.assert_array_equal, unchanged, params)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_biases_are_clipped_with_their_projections(num_kv_heads):
    of, rows = settings(num_kv_heads), batch()
    of = dataclasses.replace(of, model=dataclasses.replace(of.model, qkv_bias=True))
    params = training.init_state(of).params
    attention, keys = params.layers[0][0].attention, jax.random.split(jax.random.key(1))
    for name, key in zip(("query_bias", "key_bias"), keys, strict=True):
        bias = getattr(attention, name)
        setattr(attention, name, bias.replace(jax.random.normal(key, bias.shape)))
    ((highest,),) = before = measured(params, rows, of)
    threshold = float(np.sort(highest[0])[1:3].mean())
    ((after,),) = measured(qk_clip(params, before, threshold), rows, of)
    np.testing.assert_allclose(after, np.minimum(highest, threshold), rtol=1e-5)


@pytest.fixture(scope="module")
def one_device():
    return stepped(settings(2, TWO))


def stepped(of):
    """The described metrics of a step, and the projections after it."""
    mesh = sharding.make_mesh(of.mesh)
    state, step = training.create_state(of, mesh), training.make_train_step(of, mesh)
    rows = jax.tree.map(np.asarray, batch())
    state, metrics = step(state, training.put_batch(rows, mesh))
    projections = [layer.attention for layer in state.params.layers[0]]
    return training.describe(of, metrics), jax.tree.map(np.asarray, projections)


def test_the_step_measures_and_clips(one_device):
    """The learning rate is next to nothing: what the step changes in queries and keys is the clip alone."""
    described, projections = one_device
    of = settings(2, TWO)
    params = training.init_state(of).params
    max_logits = measured(params, batch(), of)
    want = [float(layer[repeat].max()) for repeat in range(2) for layer in max_logits[0]]
    np.testing.assert_allclose(described["max_attention_logit_by_layer"], want, rtol=1e-5)
    assert described["max_attention_logit"] == max(described["max_attention_logit_by_layer"])
    assert described["clipped_heads"] == sum(int((layer > 1.0).sum()) for layer in max_logits[0]) > 2
    expected = [layer.attention for layer in qk_clip(params, max_logits, 1.0).layers[0]]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), projections, expected)
    moved = projections[0].query[...] / params.layers[0][0].attention.query[...]
    assert moved.min() < 0.9


def test_micro_batches_recomputation_and_a_mesh_change_no_number(one_device, devices):
    spread = settings(2, TWO, mesh=config.Mesh(data=2, fsdp=2, tensor=2), accumulation=2, remat="full")
    described, projections = stepped(spread)
    for name in ("max_attention_logit", "max_attention_logit_by_layer", "clipped_heads"):
        np.testing.assert_allclose(described[name], one_device[0][name], rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), projections, one_device[1])


def test_it_costs_nothing_where_it_is_off(monkeypatch):
    """The compiled gradients are those of an attention that measures nothing, and no metric tells of it."""
    of = dataclasses.replace(settings(), qk_clip=None)
    params, rows = training.init_state(of).params, batch()
    assert jax.eval_shape(lambda p, r: training.gradients(p, r, of), params, rows)[2].max_logits is None

    def cost():
        program = jax.jit(lambda params, rows: training.gradients(params, rows, of)[0]).lower(params, rows).compile()
        return program.cost_analysis() | {"bytes": program.memory_analysis().temp_size_in_bytes}

    measuring = cost()
    monkeypatch.setattr(attention, "_highest", lambda most, _: jnp.zeros((most.shape[0], *most.shape[1:4:2])))
    assert measuring == cost()


def test_with_qk_norm_it_is_refused():
    with pytest.raises(
        InputError, match=r"qk_clip = 100.0 scales projections that model.qk_norm normalises again; turn"
    ):
        config.Config(qk_clip=100.0)
    with pytest.raises(InputError, match="qk_clip is 0.0; it must be positive, or None"):
        config.Config(qk_clip=0.0)
