"""Causal grouped-query attention within segments.

The keys' axis of scores comes before the queries': the softmax sums over rows, and the products have no transposed
factor but queries, keys, values and their gradients, which are small beside the scores. Queries go in blocks, each with
the keys up to its own end, which leaves out nearly half of the products; the backward pass computes the scores again.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmoe.ops import splash_attention

MIN_BLOCK, MAX_BLOCKS = 128, 8
TILE = 256
LOWEST = jnp.finfo(jnp.float32).min

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


class Tokens(NamedTuple):
    """Which tokens queries or keys belong to: int32 [B, S] each."""

    segments: Array
    positions: Array


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

    Where L = S the keys are those of the queries' own tokens in the order of the row, and a query sees none that comes
    after it in the row. Positions ascend within a document, so that this leaves out nothing (but for padding).

    Args:
      queries: [B, S, N, H].
      keys, values: [B, L, G, H]; query head n reads key head n // (N/G). L is S or the length of a cache.
      query_segments, key_segments: int32; a query sees only keys of its own.
      query_positions, key_positions: int32, places within the segment.

    Returns:
      [B, S, N, H] in the dtype of `queries`; the softmax is float32.
    """
    places = query_segments, key_segments, query_positions, key_positions
    return attention_and_maxima(queries, keys, values, *places)[0]


def attention_and_maxima(
    queries: Float[Array, "B S N H"],
    keys: Float[Array, "B L G H"],
    values: Float[Array, "B L G H"],
    query_segments: Int[Array, "B S"],
    key_segments: Int[Array, "B L"],
    query_positions: Int[Array, "B S"],
    key_positions: Int[Array, "B L"],
) -> tuple[Float[Array, "B S N H"], Float[Array, "B N"]]:
    """`attention`, and of each row and head the highest Q Kᵀ / √H of a query with a key that it sees, float32.

    Queries of segment 0, padding, do not count; without any other the highest is the least float32. No gradient flows
    through it. Where nobody uses it, it is not computed.
    """
    B, S, N, H = queries.shape
    G = keys.shape[2]
    grouped = queries.reshape(B, S, G, N // G, H)
    out, maxima = _attention(
        grouped, keys, values, Tokens(query_segments, query_positions), Tokens(key_segments, key_positions)
    )
    return out.reshape(B, S, N, H), maxima.reshape(B, N)


@jax.custom_vjp
def _attention(queries, keys, values, of_queries, of_keys):
    """For queries [B, S, G, n, H], n query heads for each of the G key heads: output, and maxima [B, G, n]."""
    return _either_forward(queries, keys, values, of_queries, of_keys)[0]


# On TPU the kernels take over where the keys are the queries' own and blocks fit. They keep the same residuals, what
# they know of the softmax in the place and shape of the log partition.


def _splash_applies(queries, keys):
    return queries.shape[1] == keys.shape[1] and splash_attention.supports(keys.shape[1])


def _either_forward(*inputs):
    if not _splash_applies(*inputs[:2]):
        return _forward(*inputs)
    shape = jax.eval_shape(_forward, *inputs)[1][-1].shape

    def splash(queries, keys, values, of_queries, of_keys):
        B, S, G, n, H = queries.shape
        rows = queries.reshape(B, S, G * n, H), keys, values, of_queries.segments
        out, log_partition = splash_attention.forward(*rows)
        maxima = _maxima(queries, keys, of_queries, of_keys)
        return (out.reshape(queries.shape), maxima), log_partition.reshape(shape)

    def blocked(*inputs):
        out, residuals = _forward(*inputs)
        return out, residuals[-1]

    (out, maxima), log_partition = jax.lax.platform_dependent(*inputs, tpu=splash, default=blocked)
    return (out, maxima), (*inputs, out, log_partition)


def _maxima(queries, keys, of_queries, of_keys):
    """What `_forward` reads off its scores, for the kernels, which do not tell: tile by tile on and below the diagonal,
    of which one is held at a time."""
    B, S, G, n, _ = queries.shape
    q, k = queries.transpose(0, 2, 4, 3, 1), keys.transpose(0, 2, 1, 3)
    size = next(size for size in (TILE, MIN_BLOCK, S) if S % size == 0)
    row, column = jnp.tril_indices(S // size)

    def tile(so_far, start):
        of_row, of_column = (
            jax.tree.map(lambda x, at=at: jax.lax.dynamic_slice_in_dim(x, at, size, 1), tokens)
            for tokens, at in zip((of_queries, of_keys), start, strict=True)
        )
        rows = jax.lax.dynamic_slice_in_dim(q, start[0], size, 4)
        columns = jax.lax.dynamic_slice_in_dim(k, start[1], size, 2)
        most = _scores(rows, columns, of_row, of_column).max(2, keepdims=True)
        return jnp.maximum(so_far, _highest(most, of_row)), None

    return jax.lax.scan(tile, jnp.full((B, G, n), LOWEST), (row * size, column * size))[0]


def _highest(most, of_queries):
    """[B, G, n] of each query's highest score, [B, G, 1, n, S], but for padding."""
    valid = of_queries.segments > 0
    return jnp.where(valid[:, None, None, None, :], most, LOWEST).max((2, 4))


def _either_backward(residuals, d_both):
    d_out, _ = d_both
    if not _splash_applies(*residuals[:2]):
        return _backward(residuals, d_out)

    def splash(residuals, d_out):
        queries, keys, values, of_queries, _, out, log_partition = residuals
        B, S, G, n, H = queries.shape
        whole = B, S, G * n, H
        d_queries, d_keys, d_values = splash_attention.backward(
            queries.reshape(whole),
            keys,
            values,
            of_queries.segments,
            out.reshape(whole),
            log_partition.reshape(B, G * n, S),
            d_out.reshape(whole),
        )
        return d_queries.reshape(queries.shape), d_keys, d_values

    def blocked(residuals, d_out):
        return _backward(residuals, d_out)[:3]

    return *jax.lax.platform_dependent(residuals, d_out, tpu=splash, default=blocked), None, None


def _blocks(S: int, L: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, and of the keys that they may see."""
    if S != L:
        return [(slice(0, S), slice(0, L))]
    size = max(MIN_BLOCK, -(-S // MAX_BLOCKS))
    return [(slice(start, min(start + size, S)), slice(0, min(start + size, S))) for start in range(0, S, size)]


def _scores(queries, keys, of_queries, of_keys):
    """float32 [B, G, L, n, S], of queries [B, G, H, n, S] and keys [B, G, L, H]; least where a key is not seen."""
    scores = _einsum("BGLH,BGHnS->BGLnS", keys, queries) * keys.shape[3] ** -0.5
    seen = of_keys.segments[:, :, None] == of_queries.segments[:, None, :]
    seen &= of_keys.positions[:, :, None] <= of_queries.positions[:, None, :]
    return jnp.where(seen[:, None, :, None, :], scores, LOWEST)


def _part(tokens, block):
    return jax.tree.map(lambda x: x[:, block], tokens)


def _forward(queries, keys, values, of_queries, of_keys):
    q = queries.transpose(0, 2, 4, 3, 1)
    k, v = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 3, 1)
    outs, log_partitions, maxima = [], [], []
    for block, seen in _blocks(q.shape[4], k.shape[2]):
        scores = _scores(q[..., block], k[:, :, seen], _part(of_queries, block), _part(of_keys, seen))
        most = scores.max(2, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(2, keepdims=True)
        weighted = _einsum(
            "BGHL,BGLnS->BGHnS", v[..., seen], weights.astype(v.dtype), preferred_element_type=jnp.float32
        )
        outs.append((weighted / total).astype(queries.dtype))
        log_partitions.append(most + jnp.log(total))
        maxima.append(_highest(most, _part(of_queries, block)))
    outT = jnp.concatenate(outs, -1).transpose(0, 4, 1, 3, 2)
    residuals = queries, keys, values, of_queries, of_keys, outT, jnp.concatenate(log_partitions, -1)
    return (outT, jnp.stack(maxima).max(0)), residuals


def _backward(residuals, d_out):
    queries, keys, values, of_queries, of_keys, outT, log_partition = residuals
    dtype, scale = queries.dtype, keys.shape[-1] ** -0.5
    heads_first = (0, 2, 3, 1, 4)
    q, qT = queries.transpose(heads_first), queries.transpose(0, 2, 4, 3, 1)
    do, doT = d_out.transpose(heads_first), d_out.transpose(0, 2, 4, 3, 1)
    k, kT = keys.transpose(0, 2, 1, 3), keys.transpose(0, 2, 3, 1)
    v = values.transpose(0, 2, 1, 3)
    # Of each query, Σ over keys of weight · its gradient [B, G, 1, n, S].
    delta = _einsum("BSGnH,BSGnH->BSGn", d_out, outT).transpose(0, 2, 3, 1)[:, :, None]
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block, seen in _blocks(q.shape[3], k.shape[2]):
        scores = _scores(qT[..., block], k[:, :, seen], _part(of_queries, block), _part(of_keys, seen))
        weights = jnp.exp(scores - log_partition[..., block])
        d_weights = _einsum("BGLH,BGHnS->BGLnS", v[:, :, seen], doT[..., block])
        d_scores = (weights * (d_weights - delta[..., block]) * scale).astype(dtype)
        d_q.append(_einsum("BGHL,BGLnS->BGHnS", kT[..., seen], d_scores))
        d_k = d_k.at[:, :, seen].add(_einsum("BGLnS,BGnSH->BGLH", d_scores, q[..., block, :]))
        d_v = d_v.at[:, :, seen].add(_einsum("BGLnS,BGnSH->BGLH", weights.astype(dtype), do[..., block, :]))
    d_queries = jnp.concatenate(d_q, -1).transpose(0, 4, 1, 3, 2).astype(dtype)
    return d_queries, *(x.transpose(0, 2, 1, 3).astype(dtype) for x in (d_k, d_v)), None, None


_attention.defvjp(_either_forward, _either_backward)
