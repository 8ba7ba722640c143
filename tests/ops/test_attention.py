import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import attention as module
from jmoe.ops.attention import attention


def reference(q, k, v, query_segments, key_segments, query_positions, key_positions):
    """One query at a time, in float64."""
    out = np.zeros(q.shape)
    B, S, N, H = q.shape
    per_group = N // k.shape[2]
    for b, s, n in np.ndindex(B, S, N):
        seen = (key_segments[b] == query_segments[b, s]) & (key_positions[b] <= query_positions[b, s])
        scores = k[b, seen, n // per_group].astype(np.float64) @ q[b, s, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, s, n] = weights / weights.sum() @ v[b, seen, n // per_group]
    return out


def whole(q, k, v, query_segments, key_segments, query_positions, key_positions):
    """The same from all scores at once, for its derivative."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    seen = (query_segments[:, None, :, None] == key_segments[:, None, None]) & (
        query_positions[:, None, :, None] >= key_positions[:, None, None]
    )
    scores = jnp.where(seen, jnp.einsum("BSNH,BLNH->BNSL", q, k) / np.sqrt(q.shape[-1]), -jnp.inf)
    return jnp.einsum("BNSL,BLNH->BSNH", jax.nn.softmax(scores, axis=-1), v)


def packed(rows, length):
    """Segments and positions of rows packed with documents of these lengths."""
    segments = np.stack([np.repeat(np.arange(len(lengths)) + 1, lengths) for lengths in rows])
    positions = np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in rows])
    assert segments.shape == (len(rows), length)
    return segments.astype(np.int32), positions.astype(np.int32)


def arrays(length, heads, kv_heads, H=6):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, length, heads, H)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, H)).astype(np.float32)
    return q, k, v


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_matches_the_loop_over_queries(heads, kv_heads):
    q, k, v = arrays(11, heads, kv_heads)
    segments, positions = packed([[4, 5, 2], [11]], 11)
    out = attention(*map(jnp.asarray, (q, k, v, segments, segments, positions, positions)))
    expected = reference(q, k, v, segments, segments, positions, positions)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)])
def test_values_and_gradients_across_blocks(dtype, tolerance, monkeypatch):
    """Documents that span, end at and begin at the bounds of blocks, the last of which is shorter."""
    monkeypatch.setattr(module, "MIN_BLOCK", 4)
    monkeypatch.setattr(module, "MAX_BLOCKS", 5)
    length = 22
    segments, positions = map(jnp.asarray, packed([[3, 2, 13, 4], [5, 17]], length))
    assert len(module._blocks(length, length)) == 5
    inputs = [jnp.asarray(x, dtype) for x in arrays(length, 4, 2)]

    def run(f):
        weigh = jnp.cos(jnp.arange(inputs[0].size, dtype=jnp.float32)).reshape(inputs[0].shape)
        places = segments, segments, positions, positions
        return jax.value_and_grad(lambda *qkv: jnp.sum(f(*qkv, *places).astype(jnp.float32) * weigh), (0, 1, 2))

    (value, grads), (expected, expected_grads) = (
        run(attention)(*inputs),
        run(whole)(*(x.astype(jnp.float32) for x in inputs)),
    )
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=tolerance, atol=tolerance * jnp.abs(want).max())


def test_queries_of_a_cache_see_what_is_in_it():
    """Three queries, at places 4, 5 and 6 of a cache of ten whose rest is not yet written (segment 0)."""
    q, k, v = arrays(10, 4, 2)
    key_segments = np.tile(np.array([1] * 7 + [0] * 3, np.int32), (2, 1))
    key_positions = np.tile(np.arange(10, dtype=np.int32), (2, 1))
    places = key_segments[:, 4:7], key_segments, key_positions[:, 4:7], key_positions
    out = attention(*map(jnp.asarray, (q[:, 4:7], k, v, *places)))
    np.testing.assert_allclose(out, reference(q[:, 4:7], k, v, *places), rtol=1e-5, atol=1e-5)


def test_padding_stays_finite_and_apart():
    """Padding at a row's end, all of it at position 0, changes nothing for the documents, forward or backward."""
    q, k, v = map(jnp.asarray, arrays(9, 2, 1))
    segments, positions = packed([[9], [6, 3]], 9)
    segments[1, 6:], positions[1, 6:] = 0, 0
    places = [jnp.asarray(x) for x in (segments, segments, positions, positions)]

    def total(q, k, v):
        return jnp.sum(jnp.where((places[0] > 0)[..., None, None], attention(q, k, v, *places), 0) ** 2)

    grads = jax.grad(total, (0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() and (g[1, 6:] == 0).all() for g in grads)
    np.testing.assert_allclose(
        attention(q, k, v, *places)[1, :6],
        attention(*(x[1:, :6] for x in (q, k, v, *places)))[0],
        rtol=1e-5,
        atol=1e-5,
    )


def highest(q, k, query_segments, key_segments, query_positions, key_positions):
    """One query at a time, in float64; padding does not count."""
    B, S, N, H = q.shape
    out = np.full((B, N), -np.inf)
    for b, s, n in np.ndindex(B, S, N):
        seen = (key_segments[b] == query_segments[b, s]) & (key_positions[b] <= query_positions[b, s])
        if query_segments[b, s] and seen.any():
            out[b, n] = max(out[b, n], (k[b, seen, n // (N // k.shape[2])] @ q[b, s, n]).max() / np.sqrt(H))
    return out


def test_maxima_are_over_what_is_seen(monkeypatch):
    """Across blocks, by the scores of the forward pass and tile by tile; the greatest logits are with keys after the
    query, of another document, or padding."""
    monkeypatch.setattr(module, "MIN_BLOCK", 4)
    monkeypatch.setattr(module, "TILE", 8)
    q, k, v = arrays(24, 4, 2)
    segments, positions = packed([[3, 2, 13, 6], [5, 19]], 24)
    segments[1, 20:], positions[1, 20:] = 0, 0
    q[1, 20:] *= 100
    k[0, 23] *= 100
    places = segments, segments, positions, positions
    want = highest(q, k, *places)
    out, got = module.attention_and_maxima(*map(jnp.asarray, (q, k, v, *places)))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(out, attention(*map(jnp.asarray, (q, k, v, *places))))
    tokens = module.Tokens(jnp.asarray(segments), jnp.asarray(positions))
    tiles = module._maxima(jnp.asarray(q).reshape(2, 24, 2, 2, 6), jnp.asarray(k), tokens, tokens)
    np.testing.assert_allclose(tiles.reshape(2, 4), want, rtol=1e-5)
