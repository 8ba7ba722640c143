"""Parameters with logical axes, normalisation, rotary positions, and the dense feed-forward."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jmoe.ops.matmul import apart, matmul
from jmoe.sharding import is_variable, logical_axes, shard


def parameter(value: Array, *axes: str) -> nnx.Param:
    """A parameter declared with its logical axes, one for each dimension (`jmoe.sharding.TABLE`)."""
    assert value.ndim == len(axes), f"{value.shape} declared with axes {axes}"
    return nnx.Param(value, logical_axes=axes)


class Buffer(nnx.Variable):
    """State of the model that no gradient reaches: the train step moves it."""


def buffer(value: Array, *axes: str) -> Buffer:
    """A buffer declared with its logical axes, one for each dimension."""
    assert value.ndim == len(axes), f"{value.shape} declared with axes {axes}"
    return Buffer(value, logical_axes=axes)


def normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float) -> Array:
    """Initial weights, float32: normal with this standard deviation, truncated at three of them."""
    # 0.98658 is the standard deviation of a unit normal truncated at +-3.
    return jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32) * (std / 0.98658)


def stack(modules: Any) -> Any:
    """Declares the leading `layers` axis of a module whose parameters were made under `jax.vmap`."""
    return jax.tree.map(
        lambda v: type(v)(v[...], logical_axes=("layers", *logical_axes(v))),
        modules,
        is_leaf=is_variable,
    )


class RMSNorm(nnx.Module):
    """x / rms(x) · gain (arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, eps: float, axis: str):
        self.gain = parameter(jnp.ones(size), axis)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        normalised = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        gain = jnp.expand_dims(self.gain[...], tuple(range(x.ndim - 1)))
        return (normalised * gain).astype(x.dtype)


def rotate(x: Float[Array, "B S N H"], positions: Int[Array, "B S"], base: float) -> Float[Array, "B S N H"]:
    """Rotary positions (arXiv 2104.09864, §3.2.2), in the half-split layout of Llama; angles in float32."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    # A product of arrays, not of matrices: TPUs would round the factors of an einsum to bfloat16.
    angles = positions.astype(jnp.float32)[:, :, None, None, None] * frequencies[None, None, None, None, :]
    cos, sin = apart(lambda angles: (jnp.cos(angles), jnp.sin(angles)), angles)
    # Both halves in one array, [..., 2, half]: (a, b) · cos + (-b, a) · sin is one pass, and so is its gradient.
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, half)
    sign = jnp.array([-1.0, 1.0])[None, None, None, :, None]
    return (halves * cos + halves[..., ::-1, :] * sign * sin).reshape(x.shape).astype(x.dtype)


class SwiGLU(nnx.Module):
    """The dense feed-forward: (silu(x · gate) ∘ (x · up)) · down (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int, std: float, key: PRNGKeyArray):
        gate, up, down = jax.random.split(key, 3)
        self.gate = parameter(normal(gate, (d_model, d_ff), std), "embed", "mlp")
        self.up = parameter(normal(up, (d_model, d_ff), std), "embed", "mlp")
        self.down = parameter(normal(down, (d_ff, d_model), std), "mlp", "embed")

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        gate, up = (project(x, weight) for weight in (self.gate, self.up))
        return project(shard(jax.nn.silu(gate) * up, "batch", "seq", "mlp"), self.down)


def project(x: Float[Array, "B S D"], weight: nnx.Param) -> Float[Array, "B S F"]:
    """x · weight in the dtype of `x`, accumulated in float32."""
    return matmul(x, weight[...])
