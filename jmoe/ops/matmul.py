"""The product of activations with a weight, and transpositions that do not slow a product down."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def apart(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args), for a cheap f of arrays, as arrays of their own. It has no gradient on CPU.

    XLA:CPU pulls what is cheap into each operation that reads it: cosines are computed again for every head, and the
    transposition of a factor becomes the product's own. It does not look into the branches of a condition.
    """

    def in_a_branch(*args):
        zeros = lambda *args: jax.tree.map(jnp.zeros_like, jax.eval_shape(f, *args))  # noqa: E731
        return lax.cond(lax.optimization_barrier(True), f, zeros, *args)

    return lax.platform_dependent(*args, cpu=in_a_branch, default=f)


def transposed(x: Float[Array, "M N"]) -> Float[Array, "N M"]:
    """The transpose, to multiply with.

    XLA:CPU multiplies bfloat16 as such only where neither factor is transposed; else it copies both to float32 first,
    and takes twice as long. With float32 nothing is gained.
    """
    return apart(jnp.transpose, x) if x.dtype == jnp.bfloat16 else x.T


def rounded(weight: Float[Array, "*W"], dtype: DTypeLike) -> Float[Array, "*W"]:
    """The weight in the dtype of a product, rounded there and then.

    XLA for TPU pulls a mere conversion out of the loop over layers, and keeps all of them a second time in bfloat16.
    """
    if weight.dtype == dtype:
        return weight

    def explicitly(weight):
        return lax.reduce_precision(weight, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant).astype(dtype)

    return lax.platform_dependent(weight, cpu=lambda weight: weight.astype(dtype), default=explicitly)


@jax.custom_vjp
def matmul(x: Float[Array, "*B D"], weight: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """x · weight in the dtype of `x`, to which the weight is cast; the weight's gradient keeps the weight's dtype.

    Products are accumulated in float32.
    """
    return _product(x, rounded(weight, x.dtype))


def _product(x, weight):
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, weight):
    return matmul(x, weight), (x, weight)


def _backward(residuals, d_out):
    x, weight = residuals
    tokens = math.prod(x.shape[:-1])
    x_rows, d_rows = x.reshape(tokens, -1), d_out.reshape(tokens, -1)
    d_weight = jnp.matmul(transposed(x_rows), d_rows, preferred_element_type=jnp.float32)
    return _product(d_out, transposed(rounded(weight, x.dtype))), d_weight.astype(weight.dtype)


matmul.defvjp(_forward, _backward)
