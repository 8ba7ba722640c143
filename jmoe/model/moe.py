"""The mixture-of-experts feed-forward: route, dispatch to experts, combine."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jmoe import config
from jmoe.model.expert_parallel import apply_experts
from jmoe.model.experts import Experts
from jmoe.model.router import Router, RouterStats
from jmoe.sharding import shard


class MoE(nnx.Module):
    """y_t = Σ_{e chosen by t} w_te · expert_e(x_t)."""

    def __init__(self, moe: config.MoE, model: config.Model, key: PRNGKeyArray):
        router_key, experts_key = jax.random.split(key)
        self.router = Router(moe, model, router_key)
        self.experts = Experts(moe, model, experts_key)

    def __call__(
        self, x: Float[Array, "B S D"], valid: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], RouterStats]:
        """Returns the layer's output and the router's statistics over the `valid` tokens."""
        B, S, D = x.shape
        tokens = shard(x.reshape(B * S, D), "batch", None)
        routing = self.router(tokens, valid.reshape(B * S))
        weights = self.experts.weights(x.dtype)
        out = apply_experts(tokens, routing.expert_ids, routing.combine_weights, weights)
        return out.reshape(B, S, D), routing.stats
