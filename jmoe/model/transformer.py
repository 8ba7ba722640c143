"""The decoder-only Transformer: embed → [attention → feed-forward] × N → unembed."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jmoe import config
from jmoe.flops import feed_forwards, places
from jmoe.model.attention import Attention, Cache, Place
from jmoe.model.layers import RMSNorm, SwiGLU, normal, parameter, stack
from jmoe.model.moe import MoE
from jmoe.model.router import RouterStats, balance_bias, steer_threshold
from jmoe.sharding import is_variable, logical_axes, shard

Remat = Literal["none", "dots", "full"]
# Per layer group, per layer of its pattern: arrays stacked over the group's repeats, None for dense layers.
Stats = tuple[tuple[RouterStats | None, ...], ...]
Caches = tuple[tuple[Cache, ...], ...]
# Likewise, of every layer: float32 [repeats, ..., N], of each query head the highest attention logit.
MaxLogits = tuple[tuple[Array, ...], ...]


class Outputs(NamedTuple):
    """What the model returns for B rows of S tokens."""

    hidden: Array
    """[B, S, D]: hidden states before the head, in the dtype of the layers."""
    stats: Stats
    """router statistics, sums over the tokens."""
    caches: Caches | None
    """with this call's tokens written in, where there are any."""
    max_logits: MaxLogits
    """of each row, [repeats, B, N], over pairs of a query and a key that it sees, padding left out."""


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, feed_forward: config.FeedForward, model: config.Model, key: PRNGKeyArray):
        attention_key, feed_forward_key = jax.random.split(key)
        self.attention_norm = RMSNorm(model.d_model, model.norm_eps, "embed")
        self.attention = Attention(model, attention_key)
        self.feed_forward_norm = RMSNorm(model.d_model, model.norm_eps, "embed")
        match feed_forward:
            case config.Dense(d_ff=d_ff):
                self.feed_forward = SwiGLU(model.d_model, d_ff, model.init_std, feed_forward_key)
            case config.MoE():
                self.feed_forward = MoE(feed_forward, model, feed_forward_key)

    def __call__(
        self, x: Float[Array, "B S D"], place: Place, cache: Cache | None, transport: config.Transport
    ) -> tuple[Float[Array, "B S D"], RouterStats | None, Cache | None, Float[Array, "B N"]]:
        mixed, cache, max_logits = self.attention.measured(self.attention_norm(x), place, cache)
        x = shard(x + mixed, "batch", "seq", "embed")
        h, stats = self.feed_forward_norm(x), None
        if isinstance(self.feed_forward, MoE):
            h, stats = self.feed_forward(h, place.segment_ids > 0, transport)
        else:
            h = self.feed_forward(h)
        return shard(x + h, "batch", "seq", "embed"), stats, cache, max_logits


class Transformer(nnx.Module):
    """The model. Its parameters are float32; layers compute in the dtype that the call names."""

    def __init__(self, model: config.Model, key: PRNGKeyArray):
        embed_key, head_key, *group_keys = jax.random.split(key, 2 + len(model.layers))
        V, D = model.vocab_size, model.d_model
        self.embedding = parameter(normal(embed_key, (V, D), model.init_std), "vocab", "embed")
        self.layers = nnx.List(
            nnx.List(
                stack(jax.vmap(partial(Layer, feed_forward, model))(jax.random.split(layer_key, group.repeats)))
                for feed_forward, layer_key in zip(
                    group.pattern, jax.random.split(group_key, len(group.pattern)), strict=True
                )
            )
            for group, group_key in zip(model.layers, group_keys, strict=True)
        )
        self.final_norm = RMSNorm(D, model.norm_eps, "embed")
        untied = not model.tie_embeddings
        self.head = parameter(normal(head_key, (D, V), model.init_std), "embed", "vocab") if untied else None

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        place: Place,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: Remat = "none",
        transport: config.Transport = config.Automatic(),
        caches: Caches | None = None,
    ) -> tuple[Float[Array, "B S D"], Stats, Caches | None]:
        """Hidden states before the head, router statistics and caches; `run` has the arguments."""
        outputs = self.run(tokens, place, dtype=dtype, remat=remat, transport=transport, caches=caches)
        return outputs.hidden, outputs.stats, outputs.caches

    def run(
        self,
        tokens: Int[Array, "B S"],
        place: Place,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: Remat = "none",
        transport: config.Transport = config.Automatic(),
        caches: Caches | None = None,
    ) -> Outputs:
        """Runs the layers. What a caller does not use of the outputs is not computed, under `jax.jit`.

        Args:
          tokens: int32 [B, S].
          place: segments and positions; padding (segment 0) is routed to no expert.
          dtype: of the layers' arithmetic, float32 or bfloat16.
          remat: what the backward pass recomputes.
          transport: how tokens reach experts on other devices.
          caches: keys and values of earlier tokens, as `empty_caches` makes them.
        """
        x = shard(self.embedding[...].astype(dtype)[tokens], "batch", "seq", "embed")
        all_stats, all_caches, all_logits = [], [], []
        for g, pattern in enumerate(self.layers):

            def apply_pattern(x, scanned):
                layers, layer_caches = scanned
                stats, new_caches, max_logits = [], [], []
                for i, layer in enumerate(layers):
                    x, layer_stats, cache, highest = layer(x, place, layer_caches and layer_caches[i], transport)
                    stats.append(layer_stats)
                    new_caches.append(cache)
                    max_logits.append(highest)
                return x, (tuple(stats), tuple(new_caches), tuple(max_logits))

            scanned = (_rounded_gradients(pattern, dtype), None if caches is None else caches[g])
            x, (stats, new_caches, max_logits) = jax.lax.scan(rematerialise(apply_pattern, remat), x, scanned)
            all_stats.append(stats)
            all_caches.append(new_caches)
            all_logits.append(max_logits)
        new_caches = None if caches is None else tuple(all_caches)
        return Outputs(self.final_norm(x), tuple(all_stats), new_caches, tuple(all_logits))

    def head_weight(self) -> Float[Array, "D V"]:
        """The output projection, float32 [D, V]: the embedding transposed if they are tied."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Vocabulary logits of hidden states, float32."""
        weight = self.head_weight().astype(hidden.dtype)
        return jnp.einsum("BSD,DV->BSV", hidden, weight, preferred_element_type=jnp.float32)


def _rounded_gradients(layers, dtype: DTypeLike):
    """Layers, stacked: the gradients of their experts are kept in `dtype` and take half the space.

    They were rounded to it before devices added theirs, except on CPU, where this does nothing. XLA for TPU carries
    the rounding into the loop over layers, to where it stacks them.
    """

    @jax.custom_vjp
    def of_experts(weight):
        return weight

    def round_gradient(_, d_weight):
        d_weight = jax.lax.platform_dependent(
            d_weight,
            cpu=lambda d: d,
            default=lambda d: jax.lax.optimization_barrier(d.astype(dtype)).astype(d.dtype),
        )
        return (d_weight,)

    of_experts.defvjp(lambda weight: (weight, None), round_gradient)
    return jax.tree.map(
        lambda v: v.replace(of_experts(v[...])) if "expert_mlp" in logical_axes(v) else v, layers, is_leaf=is_variable
    )


def rematerialise(body, remat: Remat):
    """`body`, whose backward pass recomputes nothing, all but matrix products, or everything."""
    match remat:
        case "none":
            return body
        case "dots":
            return jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        case "full":
            return jax.checkpoint(body)


def empty_caches(model: config.Model, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> Caches:
    """Caches for `batch` sequences of at most `length` tokens."""

    def empty(repeats):
        shape = (repeats, batch, length, model.num_kv_heads, model.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return tuple(tuple(empty(group.repeats) for _ in group.pattern) for group in model.layers)


def update_routers(params: Transformer, model: config.Model, stats: Stats, num_tokens: Float[Array, ""]) -> Transformer:
    """The model with the state of its routers, biases and thresholds, moved by a step's statistics.

    Args:
      params: the model, which is left as it is.
      model: its architecture.
      stats: sums over the whole global batch.
      num_tokens: valid tokens in it.
    """
    params = jax.tree.map(lambda x: x, params)
    for group, layers, group_stats in zip(model.layers, params.layers, stats, strict=True):
        for settings, layer, sums in zip(group.pattern, layers, group_stats, strict=True):
            if not isinstance(settings, config.MoE) or sums is None:
                continue
            router = layer.feed_forward.router
            match settings.router:
                case config.TopK(bias_rate=rate) if router.bias is not None:
                    router.bias = router.bias.replace(balance_bias(router.bias[...], sums.tokens_per_expert, rate))
                case config.Nucleus() as rule if router.p is not None:
                    # One mean over the repeats: the budget is theirs together, and the router divides it among them.
                    per_token = sums.tokens_per_expert[:, : settings.num_experts].sum(1).mean() / num_tokens
                    router.p = router.p.replace(steer_threshold(router.p[...], per_token, rule))
    return params


class RouterState(NamedTuple):
    """What `update_routers` moves in a layer's router; None for what that router lacks."""

    bias: Array | None
    """float32 [C]"""
    p: Array | None
    """float32 scalar"""


RouterStates = tuple[tuple[RouterState | None, ...], ...]


def router_states(params: Transformer) -> RouterStates:
    """The state of each router, stacked over the repeats of its layer; None for dense layers."""

    def of(feed_forward):
        if not isinstance(feed_forward, MoE):
            return None
        return RouterState(*(None if v is None else v[...] for v in (feed_forward.router.bias, feed_forward.router.p)))

    return tuple(tuple(of(layer.feed_forward) for layer in pattern) for pattern in params.layers)


def by_layer(model: config.Model, stacked: Any) -> list[tuple[int, config.MoE, Any]]:
    """What is stacked over the repeats, as `Stats` are, for each MoE layer: its index, settings and own part."""
    return [
        (index, settings, jax.tree.map(lambda s, r=repeat: s[r], stacked[g][i]))
        for index, ((g, i, repeat), settings) in enumerate(zip(places(model), feed_forwards(model), strict=True))
        if isinstance(settings, config.MoE)
    ]
