import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_matches_the_loop_over_queries(heads, kv_heads):
    rng = np.random.default_rng(0)
    B, S, H = 2, 11, 6
    q = rng.normal(size=(B, S, heads, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, S, kv_heads, H)).astype(np.float32)
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0], list(range(11))], np.int32)
    out = attention(*map(jnp.asarray, (q, k, v, segments, segments, positions, positions)))
    expected = reference(q, k, v, segments, segments, positions, positions)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
