import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config
from jmoe.model.attention import Place, positions_in_row
from jmoe.model.transformer import Transformer, by_layer, empty_caches
from jmoe.sharding import is_variable, logical_axes

MODEL = config.Model(
    vocab_size=50,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    init_std=0.2,
    layers=(
        config.LayerGroup((config.Dense(40),)),
        config.LayerGroup((config.MoE(4, 24, config.Nucleus(0.5)), config.MoE(6, 16, config.TopK(2))), repeats=2),
    ),
)
B, S = 2, 12


@pytest.fixture(scope="module")
def model():
    return Transformer(MODEL, jax.random.key(0))


def whole_rows(batch, length):
    positions, segments = positions_in_row(batch, length), jnp.ones((batch, length), jnp.int32)
    return Place(segments, positions, segments, positions)


@jax.jit
def logits(model, tokens, place):
    return model.logits(model(tokens, place)[0])


def random_tokens(seed=0, shape=(B, S)):
    return jax.random.randint(jax.random.key(seed), shape, 0, MODEL.vocab_size)


def test_a_token_sees_only_what_comes_before(model):
    tokens = random_tokens()
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % MODEL.vocab_size)
    before, after = (np.asarray(logits(model, t, whole_rows(B, S))) for t in (tokens, changed))
    np.testing.assert_allclose(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-5)
    assert np.abs(before[:, 7:] - after[:, 7:]).max(axis=(0, 2)).min() > 1e-4


def test_packed_documents_do_not_see_each_other(model):
    """Two documents and padding in one row give each document's own logits."""
    first, second = random_tokens(1, (1, 5)), random_tokens(2, (1, 4))
    row = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[*range(5), *range(4), 0, 0, 0]])
    packed = logits(model, row, Place(segments, positions, segments, positions))
    np.testing.assert_allclose(packed[:, :5], logits(model, first, whole_rows(1, 5)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:9], logits(model, second, whole_rows(1, 4)), rtol=1e-4, atol=1e-5)


def test_cached_decoding_equals_the_full_forward_pass(model):
    tokens = random_tokens()
    expected = logits(model, tokens, whole_rows(B, S))
    caches, positions = empty_caches(MODEL, B, S), positions_in_row(B, S)

    @jax.jit
    def step(token, at, caches):
        place = Place(
            jnp.ones((B, 1), jnp.int32),
            jnp.full((B, 1), at),
            (positions <= at).astype(jnp.int32),
            positions,
            at,
        )
        hidden, _, caches = model(token, place, caches=caches)
        return model.logits(hidden), caches

    for at in range(S):
        got, caches = step(tokens[:, at : at + 1], jnp.int32(at), caches)
        np.testing.assert_allclose(got[:, 0], expected[:, at], rtol=1e-4, atol=1e-5)


def test_rematerialisation_changes_no_number(model):
    tokens = random_tokens()

    def value_and_grad(remat):
        def loss(model):
            return model(tokens, whole_rows(B, S), remat=remat)[0].astype(jnp.float32).std()

        return jax.jit(jax.value_and_grad(loss))(model)

    plain = value_and_grad("none")
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), value_and_grad(remat), plain)


def test_scanned_layers_are_the_layers_one_after_another(model):
    """The stack under `lax.scan` against a loop that takes each layer's own parameters."""
    tokens, place = random_tokens(), whole_rows(B, S)
    x = model.embedding[...][tokens]
    for pattern, group in zip(model.layers, MODEL.layers, strict=True):
        for repeat in range(group.repeats):
            for layer in pattern:
                x, *_ = jax.tree.map(lambda w, r=repeat: w[r], layer)(x, place, None, config.Automatic())
    np.testing.assert_allclose(model.logits(model.final_norm(x)), logits(model, tokens, place), rtol=1e-4, atol=1e-5)


def test_statistics_come_in_the_order_of_the_layers(model):
    _, stats, _ = model(random_tokens(), whole_rows(B, S))
    layers = by_layer(MODEL, stats)
    assert [index for index, _, _ in layers] == [1, 2, 3, 4]
    assert [s.tokens_per_expert.shape for _, _, s in layers] == [(moe.num_experts,) for _, moe, _ in layers]
    assert [moe.num_experts for _, moe, _ in layers] == [4, 6, 4, 6]
    assert [float(s.tokens_per_expert.sum()) for i, _, s in layers if i in (2, 4)] == [2.0 * B * S] * 2  # top-2
    np.testing.assert_allclose([s.probability_per_expert.sum() for _, _, s in layers], B * S, rtol=1e-5)


def test_every_parameter_declares_an_axis_for_each_dimension(model):
    variables = jax.tree.leaves(model, is_leaf=is_variable)
    assert variables and all(len(logical_axes(v)) == v.ndim for v in variables)
    stacked = jax.tree.leaves(model.layers, is_leaf=is_variable)
    assert all(logical_axes(v)[0] == "layers" for v in stacked)


def test_an_untied_head_is_its_own_parameter():
    untied = Transformer(dataclasses.replace(MODEL, tie_embeddings=False), jax.random.key(0))
    assert untied.head is not None and untied.head.shape == (32, 50)
    moved = jax.grad(lambda m: m.logits(jnp.ones((1, 1, 32))).sum())(untied)
    assert np.asarray(moved.head[...]).any() and not np.asarray(moved.embedding[...]).any()


def test_bfloat16_layers_stay_near_float32(model):
    tokens, place = random_tokens(), whole_rows(B, S)
    hidden, _, _ = model(tokens, place, dtype=jnp.bfloat16)
    assert hidden.dtype == jnp.bfloat16 and model.logits(hidden).dtype == jnp.float32
    exact = np.asarray(model(tokens, place)[0])
    assert np.sqrt(np.mean((np.asarray(hidden, np.float32) - exact) ** 2)) < 0.1 * exact.std()
