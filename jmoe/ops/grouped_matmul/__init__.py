"""Matrix products of row groups, each with its own weights: the work of the experts.

Rows lie sorted by group. `weights` are those of a bucket: neighbouring groups, all or some of them. The work follows
the rows that belong to the bucket, not the length of the buffer: other rows, and those past the sum of `group_sizes`,
may hold anything, even NaN, and their outputs are zero.

An implementation is a module with two functions; the platform that the program is lowered for chooses among them:

  multiply(rows, weights, group_sizes, first_group, transposed)
      [R, F]; transposed: rows of [R, F] times the weights' transposes, [R, D].
  weight_gradient(rows, d_out, group_sizes, first_group, bucket)
      [bucket, D, F]: each group's rowsᵀ · d_out.
"""

from functools import partial

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from jmoe.ops.grouped_matmul import blocked, megablox, ragged_dot

# ragged_dot stands for GPU, where it has not been measured.
IMPLEMENTATIONS = {"cpu": blocked, "tpu": megablox, "default": ragged_dot}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    rows: Float[Array, "R D"],
    weights: Float[Array, "bucket D F"],
    group_sizes: Int[Array, " E"],
    first_group: int = 0,
) -> Float[Array, "R F"]:
    """out[r] = rows[r] @ weights[group of r - first_group], zero for rows that belong to no group with weights.

    Args:
      rows: [R, D], sorted by group; float32 or bfloat16.
      weights: [bucket, D, F], of the same dtype: those of the groups from `first_group` on, of all or of some.
      group_sizes: int32 [E], rows of each group, zero allowed; their sum is at most R.
      first_group: the group of `weights[0]`.

    Returns:
      [R, F] in the dtype of `rows`; products are accumulated in float32.

    Raises:
      ValueError: there are more weights than groups from `first_group` on.
    """
    bucket, groups = weights.shape[0], group_sizes.shape[0]
    if not 0 <= first_group <= groups - bucket:
        raise ValueError(f"weights of {bucket} groups from group {first_group} on, but there are {groups} groups")
    return _multiply(rows, weights, group_sizes, first_group, transposed=False)


def _forward(rows, weights, group_sizes, first_group):
    return grouped_matmul(rows, weights, group_sizes, first_group), (rows, weights, group_sizes)


def _backward(first_group, residuals, d_out):
    rows, weights, group_sizes = residuals
    d_rows = _multiply(d_out, weights, group_sizes, first_group, transposed=True)
    d_weights = _weight_gradient(rows, d_out, group_sizes, first_group, bucket=weights.shape[0])
    return d_rows, d_weights, None


grouped_matmul.defvjp(_forward, _backward)


def _multiply(rows, weights, group_sizes, first_group, transposed):
    branches = {
        platform: partial(implementation.multiply, first_group=first_group, transposed=transposed)
        for platform, implementation in IMPLEMENTATIONS.items()
    }
    return lax.platform_dependent(rows, weights, group_sizes, **branches)


def _weight_gradient(rows, d_out, group_sizes, first_group, bucket):
    branches = {
        platform: partial(implementation.weight_gradient, first_group=first_group, bucket=bucket)
        for platform, implementation in IMPLEMENTATIONS.items()
    }
    return lax.platform_dependent(rows, d_out, group_sizes, **branches)
