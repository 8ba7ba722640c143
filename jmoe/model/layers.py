"""Parameters with logical axes, normalisation, rotary positions, and the dense feed-forward."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jmoe.sharding import is_variable, logical_axes, shard


def parameter(value: Array, *axes: str) -> nnx.Param:
    """A parameter declared with its logical axes, one for each dimension (`jmoe.sharding.TABLE`)."""
    assert value.ndim == len(axes), f"{value.shape} declared with axes {axes}"
    return nnx.Param(value, logical_axes=axes)


def normal(key: PRNGKeyArray, shape: tuple[int, ...], std: float) -> Array:
    """Initial weights, float32: normal with this standard deviation, truncated at three of them."""
    # 0.98658 is the standard deviation of a unit normal truncated at +-3.
    return jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32) * (std / 0.98658)


def stack(modules: Any) -> Any:
    """Declares the leading `layers` axis of a module whose parameters were made under `jax.vmap`."""
    return jax.tree.map(
        lambda v: nnx.Param(v[...], logical_axes=("layers", *logical_axes(v))),
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
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


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
    return jnp.matmul(x, weight[...].astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
