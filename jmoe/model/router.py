"""Routers: which experts a token goes to, and with what weight.

Every router returns the one `Routing`; `expert_id == num_experts` is the one sentinel for "no expert", which unused
slots of a nucleus and all slots of a padding token carry.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jmoe import config
from jmoe.model.layers import normal, parameter


class RouterStats(NamedTuple):
    """Sums over the valid tokens of one layer; never means, so that they add up over micro-batches and devices."""

    tokens_per_expert: Array
    """float32 [E]: assignments of each expert."""
    probability_per_expert: Array
    """float32 [E]: summed router probability of each expert."""
    entropy: Array
    """float32 scalar: summed entropy of the tokens' router probabilities, nats."""


class Routing(NamedTuple):
    """The decision of a router for T tokens, float32."""

    expert_ids: Array
    """int32 [T, K]: the experts of each token; `num_experts` means none."""
    combine_weights: Array
    """float32 [T, K]: weight of each expert's output; 0 where there is none."""
    stats: RouterStats


def top_k(probabilities: Float[Array, "T E"], slots: int) -> tuple[Array, Array, Array]:
    """The `slots` most probable experts, weights renormalised to sum to 1.

    Returns expert ids int32 [T, K], weights float32 [T, K], and which slots are used, bool [T, K]: all.
    """
    top, ids = jax.lax.top_k(probabilities, slots)
    return ids, top / top.sum(-1, keepdims=True), jnp.ones(ids.shape, bool)


def nucleus(probabilities: Float[Array, "T E"], p: float, slots: int) -> tuple[Array, Array, Array]:
    """The smallest set of experts whose probabilities sum to more than p (arXiv 2403.07652).

    The expert that crosses p is included, and the weights are the raw probabilities. Where the sum never exceeds p, as
    p = 1 should have it, all `slots` experts are chosen; the paper's code falls back to the single best one there. (At
    p = 1 the float32 sum may still round above 1 and leave out experts whose probability is lost in that rounding.)

    Returns expert ids int32 [T, K], weights float32 [T, K], and which slots are used, bool [T, K].
    """
    top, ids = jax.lax.top_k(probabilities, slots)
    sum_before = jnp.pad(jnp.cumsum(top, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    return ids, top, sum_before <= p


class Router(nnx.Module):
    """Softmax over a linear map of the token, in float32, then the choice of experts."""

    def __init__(self, moe: config.MoE, model: config.Model, key: PRNGKeyArray):
        self.weight = parameter(normal(key, (model.d_model, moe.num_experts), model.init_std), "embed", "expert")
        self.moe = moe

    def __call__(self, tokens: Float[Array, "T D"], valid: Bool[Array, " T"]) -> Routing:
        """Routes T tokens; those that are not `valid` go to no expert and are left out of the statistics."""
        # The highest precision also on TPU, whose default would round the router's inputs to bfloat16.
        logits = jnp.matmul(tokens.astype(jnp.float32), self.weight[...], precision=jax.lax.Precision.HIGHEST)
        log_probabilities = jax.nn.log_softmax(logits, axis=-1)
        probabilities = jnp.exp(log_probabilities)
        match self.moe.router:
            case config.TopK():
                ids, weights, used = top_k(probabilities, self.moe.slots)
            case config.Nucleus(p=p):
                ids, weights, used = nucleus(probabilities, p, self.moe.slots)
        used &= valid[:, None]
        E, counted = self.moe.num_experts, valid[:, None].astype(jnp.float32)
        expert_ids = jnp.where(used, ids, E).astype(jnp.int32)
        stats = RouterStats(
            tokens_per_expert=jnp.bincount(expert_ids.reshape(-1), length=E + 1)[:E].astype(jnp.float32),
            probability_per_expert=jnp.sum(probabilities * counted, axis=0),
            entropy=-jnp.sum(probabilities * log_probabilities * counted),
        )
        return Routing(expert_ids, jnp.where(used, weights, 0.0), stats)
