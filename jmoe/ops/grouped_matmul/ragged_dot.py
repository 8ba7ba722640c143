"""For platforms without an implementation of their own: XLA's ragged dot.

It knows groups from row 0 on, so the rows of a bucket are rolled to the top. Where XLA has no kernel for it, as on CPU
and for the weight gradient on TPU, it is a dense product of all rows with every group's weights.
"""

import jax.numpy as jnp
from jax import lax


def multiply(rows, weights, group_sizes, first_group, transposed):
    contraction = (((1,), (2 if transposed else 1,)), ((), ()))
    sizes = group_sizes[first_group : first_group + weights.shape[0]]
    rows = _only(_roll(rows, -group_sizes[:first_group]), sizes)
    out = lax.ragged_dot_general(
        rows,
        weights,
        sizes,
        lax.RaggedDotDimensionNumbers(contraction, lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]),
        preferred_element_type=jnp.float32,
    ).astype(rows.dtype)
    return _roll(_only(out, sizes), group_sizes[:first_group])


def weight_gradient(rows, d_out, group_sizes, first_group, bucket):
    contraction = (((0,), (0,)), ((), ()))
    sizes = group_sizes[first_group : first_group + bucket]
    rows, d_out = (_only(_roll(array, -group_sizes[:first_group]), sizes) for array in (rows, d_out))
    return lax.ragged_dot_general(
        rows,
        d_out,
        sizes,
        lax.RaggedDotDimensionNumbers(contraction, lhs_ragged_dimensions=[0], rhs_group_dimensions=[]),
        preferred_element_type=jnp.float32,
    ).astype(rows.dtype)


def _roll(rows, sizes):
    """Down by the sum of `sizes`."""
    return jnp.roll(rows, sizes.sum(), axis=0) if sizes.size else rows


def _only(rows, sizes):
    """Zeros past the groups, where there may be NaN."""
    return jnp.where((jnp.arange(rows.shape[0]) < sizes.sum())[:, None], rows, 0)
