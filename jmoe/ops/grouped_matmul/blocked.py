"""For CPU: a loop over blocks of rows that never span two groups.

A group's last block may reach into the next group's rows; what it computes there is masked, and overwritten since
blocks run in ascending order. The trip count is known only when the loop runs, so the work follows the rows there are.
"""

import jax.numpy as jnp
from jax import lax

BLOCK_ROWS = 128


def blocks(group_sizes, first_group, bucket, block_rows=BLOCK_ROWS):
    """For each group of the bucket: the row it starts at, the row it ends at, and the blocks run up to its end."""
    own = slice(first_group, first_group + bucket)
    sizes, ends = group_sizes[own], jnp.cumsum(group_sizes)[own]
    return ends - sizes, ends, jnp.cumsum(-(-sizes // block_rows))


def locate(block, starts, ends, blocks_until, block_rows=BLOCK_ROWS):
    """The group of a block within the bucket, its first row, and which of its rows are the group's, [block_rows, 1]."""
    group = jnp.searchsorted(blocks_until, block, side="right").astype(jnp.int32)
    blocks_before = jnp.where(group > 0, blocks_until[group - 1], 0)
    start = starts[group] + (block - blocks_before) * block_rows
    return group, start, (start + jnp.arange(block_rows) < ends[group])[:, None]


def pad_rows(rows, block_rows=BLOCK_ROWS):
    """A block more, for the last one to reach into."""
    return jnp.pad(rows, ((0, block_rows), (0, 0)))


def multiply(rows, weights, group_sizes, first_group, transposed):
    bounds = blocks(group_sizes, first_group, weights.shape[0])
    padded, columns = pad_rows(rows), weights.shape[1 if transposed else 2]
    # Contracting over the weights' last axis is as fast here as over their first; transposing them first is not.
    contraction = (((1,), (1 if transposed else 0,)), ((), ()))

    def body(block, out):
        group, start, inside = locate(block, *bounds)
        lhs = lax.dynamic_slice_in_dim(padded, start, BLOCK_ROWS)
        rhs = lax.dynamic_index_in_dim(weights, group, keepdims=False)
        product = lax.dot_general(lhs, rhs, contraction, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(inside, product, 0).astype(out.dtype), start, 0)

    out = jnp.zeros((padded.shape[0], columns), rows.dtype)
    return lax.fori_loop(0, bounds[2][-1], body, out)[: rows.shape[0]]


def weight_gradient(rows, d_out, group_sizes, first_group, bucket):
    bounds = blocks(group_sizes, first_group, bucket)
    rows, d_out = pad_rows(rows), pad_rows(d_out)

    def body(block, d_weights):
        group, start, inside = locate(block, *bounds)
        # Both factors are masked: what lies past a group may be NaN, and 0 * NaN is NaN.
        lhs = jnp.where(inside, lax.dynamic_slice_in_dim(rows, start, BLOCK_ROWS), 0)
        rhs = jnp.where(inside, lax.dynamic_slice_in_dim(d_out, start, BLOCK_ROWS), 0)
        product = jnp.matmul(lhs.T, rhs, preferred_element_type=jnp.float32)
        so_far = lax.dynamic_index_in_dim(d_weights, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(d_weights, so_far + product, group, 0)

    d_weights = jnp.zeros((bucket, rows.shape[1], d_out.shape[1]), jnp.float32)
    return lax.fori_loop(0, bounds[2][-1], body, d_weights).astype(rows.dtype)
