"""Grouped-query attention (arXiv 2305.13245) with rotary positions and optional QK-norm, and its key-value cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jmoe import config
from jmoe.model.layers import RMSNorm, normal, parameter, rotate
from jmoe.ops.attention import attention_and_maxima
from jmoe.ops.matmul import matmul
from jmoe.sharding import shard, spec, undivided


class Cache(NamedTuple):
    """Keys and values of the tokens so far: [B, L, G, H] each, for one layer, L the longest sequence it can hold."""

    keys: Array
    values: Array


class Place(NamedTuple):
    """Where the tokens of a call stand, the same for every layer."""

    segment_ids: Array
    """int32 [B, S]: of the queries."""
    positions: Array
    """int32 [B, S]: of the queries."""
    key_segment_ids: Array
    """int32 [B, L]: of the keys; L = S without a cache."""
    key_positions: Array
    """int32 [B, L]: of the keys."""
    start: Array | None = None
    """int32 scalar: where in the cache the call's tokens go; None without a cache."""


class Attention(nnx.Module):
    """Projections, rotary positions, attention, output projection."""

    def __init__(self, model: config.Model, key: PRNGKeyArray):
        D, N, G, H = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
        q, k, v, o = jax.random.split(key, 4)
        self.query = parameter(normal(q, (D, N, H), model.init_std), "embed", "heads", "head_dim")
        self.key = parameter(normal(k, (D, G, H), model.init_std), "embed", "kv_heads", "head_dim")
        self.value = parameter(normal(v, (D, G, H), model.init_std), "embed", "kv_heads", "head_dim")
        self.out = parameter(normal(o, (N, H, D), model.init_std), "heads", "head_dim", "embed")
        # Vectors, so that an optimiser takes them for no matrices: the heads' biases one after another.
        self.query_bias = parameter(jnp.zeros(N * H), "heads") if model.qkv_bias else None
        self.key_bias = parameter(jnp.zeros(G * H), "kv_heads") if model.qkv_bias else None
        self.value_bias = parameter(jnp.zeros(G * H), "kv_heads") if model.qkv_bias else None
        self.query_norm = qk_norm(model, N, "heads") if model.qk_norm else None
        self.key_norm = qk_norm(model, G, "kv_heads") if model.qk_norm else None
        self.rope_base = model.rope_base

    def __call__(
        self, x: Float[Array, "B S D"], place: Place, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Returns the output and, where a cache is given, the cache with this call's keys and values written in."""
        return self.measured(x, place, cache)[:2]

    def measured(
        self, x: Float[Array, "B S D"], place: Place, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None, Float[Array, "B N"]]:
        """The same, and of each row and head the highest logit before the softmax (`attention_and_maxima`)."""
        q = add_bias(to_heads(x, self.query[...]), self.query_bias)
        k = add_bias(to_heads(x, self.key[...]), self.key_bias)
        v = add_bias(to_heads(x, self.value[...]), self.value_bias)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = normalise(q, self.query_norm), normalise(k, self.key_norm)
        q, k = (rotate(heads, place.positions, self.rope_base) for heads in (q, k))
        q = shard(q, "batch", "seq", "heads", "head_dim")
        k = shard(k, "batch", "seq", "kv_heads", "head_dim")
        v = shard(v, "batch", "seq", "kv_heads", "head_dim")
        if cache is not None:
            assert place.start is not None, "with a cache, say where in it the tokens go"
            cache = Cache(
                jax.lax.dynamic_update_slice_in_dim(cache.keys, k, place.start, axis=1),
                jax.lax.dynamic_update_slice_in_dim(cache.values, v, place.start, axis=1),
            )
            k, v = cache
        mixed, maxima = attend(q, k, v, place)
        return from_heads(mixed, self.out[...]), cache, maxima


def qk_norm(model: config.Model, heads: int, axis: str) -> RMSNorm:
    """The norm of queries or keys: over a head, or over all `heads` of them."""
    if model.qk_norm_over == "head":
        return RMSNorm(model.head_dim, model.norm_eps, "head_dim")
    return RMSNorm(heads * model.head_dim, model.norm_eps, axis)


def normalise(heads: Float[Array, "B S N H"], norm: RMSNorm) -> Float[Array, "B S N H"]:
    """The heads normalised, each by itself or all together, as long as the norm's gain is."""
    return norm(heads.reshape(*heads.shape[:2], -1, norm.gain.shape[-1])).reshape(heads.shape)


def add_bias(heads: Float[Array, "B S N H"], bias: nnx.Param | None) -> Float[Array, "B S N H"]:
    """heads + bias in the dtype of `heads`; there may be none."""
    if bias is None:
        return heads
    return heads + bias[...].reshape(1, 1, *heads.shape[2:]).astype(heads.dtype)


def attend(
    q: Float[Array, "B S N H"], k: Float[Array, "B L G H"], v: Float[Array, "B L G H"], place: Place
) -> tuple[Float[Array, "B S N H"], Float[Array, "B N"]]:
    """`attention_and_maxima` on the mesh in use, each device with its own rows and heads: XLA cannot split a Pallas
    kernel."""
    places = place.segment_ids, place.key_segment_ids, place.positions, place.key_positions
    if undivided():
        return attention_and_maxima(q, k, v, *places)
    rows = spec("batch", "seq")
    queries, keys = (spec("batch", "seq", heads, "head_dim") for heads in ("heads", "kv_heads"))
    # Unchecked, since Pallas kernels do not say over which axes their results vary.
    on_device = jax.shard_map(
        attention_and_maxima,
        in_specs=(queries, keys, keys, rows, rows, rows, rows),
        out_specs=(queries, spec("batch", "heads")),
        check_vma=False,
    )
    return on_device(q, k, v, *places)


def to_heads(x: Float[Array, "B S D"], weight: Float[Array, "D N H"]) -> Float[Array, "B S N H"]:
    """x · weight, in the dtype of `x`."""
    return matmul(x, weight.reshape(weight.shape[0], -1)).reshape(*x.shape[:-1], *weight.shape[1:])


def from_heads(heads: Float[Array, "B S N H"], weight: Float[Array, "N H D"]) -> Float[Array, "B S D"]:
    """The heads side by side · weight, in the dtype of `heads`."""
    return matmul(heads.reshape(*heads.shape[:-2], -1), weight.reshape(-1, weight.shape[-1]))


def positions_in_row(batch: int, length: int) -> Int[Array, "B S"]:
    """0 .. length-1 in every row, int32 [batch, length]."""
    return jnp.tile(jnp.arange(length, dtype=jnp.int32), (batch, 1))
