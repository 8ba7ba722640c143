"""Causal grouped-query attention within segments."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    queries: Float[Array, "B S N H"],
    keys: Float[Array, "B L G H"],
    values: Float[Array, "B L G H"],
    query_segments: Int[Array, "B S"],
    key_segments: Int[Array, "B L"],
    query_positions: Int[Array, "B S"],
    key_positions: Int[Array, "B L"],
) -> Float[Array, "B S N H"]:
    """softmax(Q Kᵀ / √H) V over the keys of the same segment at the same or an earlier position.

    Args:
      queries: [B, S, N, H].
      keys, values: [B, L, G, H]; query head n reads key head n // (N/G). L is S or the length of a cache.
      query_segments, key_segments: int32; a query sees only keys of its own.
      query_positions, key_positions: int32, places within the segment.

    Returns:
      [B, S, N, H] in the dtype of `queries`; the softmax is float32.
    """
    B, S, N, H = queries.shape
    G = keys.shape[2]
    # Heads outermost: XLA:CPU runs these batched products fastest as [B, heads, S, H].
    q = queries.reshape(B, S, G, N // G, H).transpose(0, 2, 3, 1, 4)
    k, v = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BGnSH,BGLH->BGnSL", q, k, preferred_element_type=jnp.float32) * H**-0.5
    visible = (query_segments[:, :, None] == key_segments[:, None, :]) & (
        query_positions[:, :, None] >= key_positions[:, None, :]
    )
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BGnSL,BGLH->BGnSH", weights, v, preferred_element_type=jnp.float32)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, S, N, H).astype(queries.dtype)
