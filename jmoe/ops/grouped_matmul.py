"""Matrix products of row groups, each with its own weights: the work of the experts.

Rows lie sorted by group; group g is multiplied by `weights[g]`. The work follows the rows that belong to a group, not
the length of the buffer: rows past the sum of `group_sizes` may hold anything, even NaN, and their outputs are zero.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK_ROWS = 128


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, "R D"], weights: Float[Array, "E D F"], group_sizes: Int[Array, " E"]
) -> Float[Array, "R F"]:
    """out[r] = rows[r] @ weights[group of r], zero for rows past the last group.

    Args:
      rows: [R, D], sorted by group; float32 or bfloat16.
      weights: [E, D, F], of the same dtype.
      group_sizes: int32 [E], rows of each group, zero allowed; their sum is at most R.

    Returns:
      [R, F] in the dtype of `rows`; products are accumulated in float32.
    """
    return _forward(rows, weights, group_sizes)


def _vjp_forward(rows, weights, group_sizes):
    return _forward(rows, weights, group_sizes), (rows, weights, group_sizes)


def _vjp_backward(residuals, d_out):
    rows, weights, group_sizes = residuals
    d_rows = _forward(d_out, weights.swapaxes(1, 2), group_sizes)
    d_weights = _weight_gradient(rows, d_out, group_sizes)
    return d_rows, d_weights.astype(weights.dtype), None


grouped_matmul.defvjp(_vjp_forward, _vjp_backward)


def _forward(rows, weights, group_sizes):
    return lax.platform_dependent(rows, weights, group_sizes, cpu=_blocked, default=_ragged)


def _weight_gradient(rows, d_out, group_sizes):
    return lax.platform_dependent(
        rows, d_out, group_sizes, cpu=_blocked_weight_gradient, default=_ragged_weight_gradient
    )


# The blocked implementation, for CPU: blocks of rows that never span two groups. A group's last block may reach into
# the next group's rows; what it computes there is masked, and overwritten since blocks run in ascending order.


def _blocks(group_sizes, block_rows):
    """For each group: the row it starts at, the row it ends at, and the blocks run up to its end."""
    ends = jnp.cumsum(group_sizes)
    return ends - group_sizes, ends, jnp.cumsum(-(-group_sizes // block_rows))


def _locate(block, starts, ends, blocks_until, block_rows):
    """The group of a block, its first row, and which of its rows belong to the group, [block_rows, 1]."""
    group = jnp.searchsorted(blocks_until, block, side="right").astype(jnp.int32)
    blocks_before = jnp.where(group > 0, blocks_until[group - 1], 0)
    start = starts[group] + (block - blocks_before) * block_rows
    return group, start, (start + jnp.arange(block_rows) < ends[group])[:, None]


def _pad_rows(rows, block_rows):
    return jnp.pad(rows, ((0, block_rows), (0, 0)))


def _zeros(shape, dtype, group_sizes):
    """Zeros made from `group_sizes`, so that under `shard_map` they vary over the mesh as a loop's carry must."""
    return jnp.full(shape, (0 * group_sizes[0]).astype(dtype))


def _blocked(rows, weights, group_sizes, block_rows=BLOCK_ROWS):
    starts, ends, blocks_until = _blocks(group_sizes, block_rows)
    padded = _pad_rows(rows, block_rows)

    def body(block, out):
        group, start, inside = _locate(block, starts, ends, blocks_until, block_rows)
        lhs = lax.dynamic_slice_in_dim(padded, start, block_rows)
        rhs = lax.dynamic_index_in_dim(weights, group, keepdims=False)
        product = jnp.matmul(lhs, rhs, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(inside, product, 0).astype(out.dtype), start, 0)

    out = _zeros((padded.shape[0], weights.shape[2]), rows.dtype, group_sizes)
    return lax.fori_loop(0, blocks_until[-1], body, out)[: rows.shape[0]]


def _blocked_weight_gradient(rows, d_out, group_sizes, block_rows=BLOCK_ROWS):
    starts, ends, blocks_until = _blocks(group_sizes, block_rows)
    rows, d_out = _pad_rows(rows, block_rows), _pad_rows(d_out, block_rows)

    def body(block, d_weights):
        group, start, inside = _locate(block, starts, ends, blocks_until, block_rows)
        # Both factors are masked: what lies past a group may be NaN, and 0 * NaN is NaN.
        lhs = jnp.where(inside, lax.dynamic_slice_in_dim(rows, start, block_rows), 0)
        rhs = jnp.where(inside, lax.dynamic_slice_in_dim(d_out, start, block_rows), 0)
        product = jnp.matmul(lhs.T, rhs, preferred_element_type=jnp.float32)
        so_far = lax.dynamic_index_in_dim(d_weights, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(d_weights, so_far + product, group, 0)

    d_weights = _zeros((group_sizes.shape[0], rows.shape[1], d_out.shape[1]), jnp.float32, group_sizes)
    return lax.fori_loop(0, blocks_until[-1], body, d_weights)


# Elsewhere: XLA's ragged dot.


def _zero_past_groups(rows, group_sizes):
    return jnp.where((jnp.arange(rows.shape[0]) < group_sizes.sum())[:, None], rows, 0)


def _ragged(rows, weights, group_sizes):
    rows = _zero_past_groups(rows, group_sizes)
    out = lax.ragged_dot(rows, weights, group_sizes, preferred_element_type=jnp.float32).astype(rows.dtype)
    return _zero_past_groups(out, group_sizes)


def _ragged_weight_gradient(rows, d_out, group_sizes):
    rows, d_out = _zero_past_groups(rows, group_sizes), _zero_past_groups(d_out, group_sizes)
    dimension_numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(rows, d_out, group_sizes, dimension_numbers, preferred_element_type=jnp.float32)
