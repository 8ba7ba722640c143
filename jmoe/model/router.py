"""Routers: which experts a token goes to, and with what weight.

Every router returns the one `Routing`; `expert_id == num_experts` is the one sentinel for "no expert", which unused
slots of a nucleus, all slots of a padding token and choices of an identity expert carry.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jmoe import config
from jmoe.model.layers import buffer, normal, parameter


class RouterStats(NamedTuple):
    """Sums over the valid tokens of one layer; never means, so that they add up over micro-batches and devices.

    C are the router's choices: the experts, then the identity experts.
    """

    tokens_per_expert: Array
    """float32 [C]: assignments of each choice."""
    probability_per_expert: Array
    """float32 [C]: summed router probability of each choice."""
    tokens_per_count: Array
    """float32 [K+1]: tokens that go to 0, 1, ... K experts; identity experts do not count."""
    entropy: Array
    """float32 scalar: summed entropy of the tokens' router probabilities, nats."""
    z_squared: Array
    """float32 scalar: summed squared log-partition of the router's logits."""
    sequence_balance: Array
    """float32 scalar: load-balance loss of each sequence times its tokens, summed."""
    dropped: Array
    """float32 scalar: assignments left out for want of a slot, or of capacity on the expert's device."""


class Routing(NamedTuple):
    """The decision of a router for T tokens, float32."""

    expert_ids: Array
    """int32 [T, K]: the experts of each token; `num_experts` means none."""
    combine_weights: Array
    """float32 [T, K]: weight of each expert's output; 0 where there is none."""
    identity_weights: Array
    """float32 [T]: weight of the token itself, from the identity experts it goes to."""
    stats: RouterStats


class Choice(NamedTuple):
    """What a rule chooses for T tokens of C choices, in slots of which some may be left unused."""

    ids: Array
    """int32 [T, K]."""
    weights: Array
    """float32 [T, K]."""
    used: Array
    """bool [T, K]: whether the slot is."""
    dropped: Array
    """int32 [T]: choices that the rule asked for, left out for want of a slot."""


def top_k(scores: Float[Array, "T C"], rule: config.TopK, bias: Float[Array, " C"] | None = None) -> Choice:
    """The k choices of the highest score plus bias; the scores alone weigh them (arXiv 2408.15664, 2412.19437 §2.1.2).

    The bias serves the choice only: no gradient reaches it, nor any through it.
    """
    ranked = jax.lax.stop_gradient(scores if bias is None else scores + bias[None])
    if rule.groups > 1:
        ranked = within_best_groups(ranked, rule.groups, rule.groups_per_token)
    _, ids = jax.lax.top_k(ranked, rule.k)
    weights = pick(scores, ids)
    if rule.renormalise:
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-20)  # sigmoids may all be 0
    return Choice(ids, weights * rule.scale, jnp.ones(ids.shape, bool), jnp.zeros(ids.shape[0], jnp.int32))


def within_best_groups(scores: Float[Array, "T C"], groups: int, groups_per_token: int) -> Float[Array, "T C"]:
    """Scores, −inf outside each token's best groups: those with the largest sum of their two highest scores
    (arXiv 2412.19437, as its released code has it)."""
    T, C = scores.shape
    by_group = scores.reshape(T, groups, C // groups)
    best_two, _ = jax.lax.top_k(by_group, min(2, C // groups))
    _, best = jax.lax.top_k(best_two.sum(-1), groups_per_token)
    allowed = one_hot(best, groups).any(1)
    return jnp.where(allowed[..., None], by_group, -jnp.inf).reshape(T, C)


def nucleus(
    probabilities: Float[Array, "T C"], p: float | Float[Array, ""], bound: int, max_slots: int | None = None
) -> Choice:
    """The smallest set of choices whose probabilities sum to more than p (arXiv 2403.07652).

    The one that crosses p is included, and the weights are the raw probabilities. Where the sum never exceeds p, as
    p = 1 should have it, all are chosen, as by the paper's code. (At p = 1 the float32 sum may still round above 1 and
    leave out experts whose probability is lost in that rounding.)

    Args:
      probabilities: float32 [T, C].
      p: threshold.
      bound: the most choices that a token can ask for, `config.Nucleus.bound`.
      max_slots: the most it gets; the least probable are dropped.
    """
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(probabilities), bound)
    weights = pick(probabilities, ids)
    sum_before = jnp.pad(jnp.cumsum(jax.lax.stop_gradient(weights), axis=-1)[:, :-1], ((0, 0), (1, 0)))
    asked = sum_before <= p
    used = asked[:, :max_slots]
    return Choice(ids[:, :max_slots], weights[:, :max_slots], used, asked.sum(-1) - used.sum(-1))


def one_hot(ids: Int[Array, "*T"], size: int) -> Bool[Array, "*T C"]:
    """Whether an id is 0 .. size-1: sums over it count, select and scatter without a scatter in either pass."""
    return ids[..., None] == jnp.arange(size).reshape((1,) * ids.ndim + (size,))


def pick(scores: Float[Array, "T C"], ids: Int[Array, "T K"]) -> Float[Array, "T K"]:
    """scores[t, ids[t, k]]."""
    return jnp.where(one_hot(ids, scores.shape[1]), scores[:, None], 0.0).sum(-1)


class Router(nnx.Module):
    """Scores from a linear map of the token, in float32, then the choice of experts."""

    def __init__(self, moe: config.MoE, model: config.Model, key: PRNGKeyArray):
        self.moe = moe
        self.weight = parameter(normal(key, (model.d_model, moe.num_choices), model.init_std), "embed", "router")
        bias = p = None
        match moe.router:
            case config.TopK(bias_rate=rate) if rate > 0:
                bias = buffer(jnp.zeros(moe.num_choices), "router")
            case config.Nucleus(p=start, experts_per_token=budget) if budget is not None:
                p = buffer(jnp.asarray(start, jnp.float32))
        self.bias, self.p = bias, p

    def __call__(self, x: Float[Array, "B S D"], valid: Bool[Array, "B S"]) -> Routing:
        """Routes T = B·S tokens; those that are not `valid` go to no expert and are left out of the statistics."""
        B, S, D = x.shape
        C, E = self.moe.num_choices, self.moe.num_experts
        tokens = x.reshape(B * S, D).astype(jnp.float32)
        # The highest precision also on TPU, whose default would round the router's inputs to bfloat16.
        logits = jnp.matmul(tokens, self.weight[...], precision=jax.lax.Precision.HIGHEST)
        sigmoid = isinstance(self.moe.router, config.TopK) and self.moe.router.score == "sigmoid"
        # Probabilities are the scores over their sum: what the balance losses and the entropy are made of.
        log_probabilities = jax.nn.log_softmax(jax.nn.log_sigmoid(logits) if sigmoid else logits, axis=-1)
        probabilities = jnp.exp(log_probabilities)
        match self.moe.router:
            case config.TopK() as rule:
                bias = None if self.bias is None else self.bias[...]
                choice = top_k(jax.nn.sigmoid(logits) if sigmoid else probabilities, rule, bias)
            case config.Nucleus() as rule:
                p = rule.p if self.p is None else self.p[...]
                choice = nucleus(probabilities, p, rule.bound(C), rule.max_slots)

        counted = valid.reshape(B * S)
        used = choice.used & counted[:, None]
        by_expert = used & (choice.ids < E)
        identity_weights = jnp.sum(choice.weights, axis=1, where=used & (choice.ids >= E))

        def per_sequence(values):  # [T, ...] -> [B, ...]
            return jnp.sum(values.reshape(B, S, *values.shape[1:]), axis=1, dtype=jnp.float32)

        counts = per_sequence((one_hot(choice.ids, C) & used[..., None]).sum(1))
        mass = per_sequence(jnp.where(counted[:, None], probabilities, 0.0))
        share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
        per_count = one_hot(by_expert.sum(-1), self.moe.slots + 1) & counted[:, None]
        entropy = -jnp.sum(probabilities * log_probabilities, axis=-1)
        z_squared = jax.nn.logsumexp(logits, axis=-1) ** 2
        stats = RouterStats(
            tokens_per_expert=counts.sum(0),
            probability_per_expert=mass.sum(0),
            tokens_per_count=per_count.sum(0, dtype=jnp.float32),
            entropy=jnp.sum(entropy, where=counted),
            z_squared=jnp.sum(z_squared, where=counted),
            sequence_balance=C * jnp.sum(share * mass),
            dropped=jnp.sum(choice.dropped, where=counted, dtype=jnp.float32),
        )
        expert_ids = jnp.where(by_expert, choice.ids, E).astype(jnp.int32)
        return Routing(expert_ids, jnp.where(by_expert, choice.weights, 0.0), identity_weights, stats)


# ------------------------------------------------------------------------------- what the train step moves, once a step


def balance_bias(bias: Float[Array, "*L C"], tokens_per_expert: Float[Array, "*L C"], rate: float) -> Array:
    """The bias after a step: up for choices below the mean load of the global batch, down for those above it, by
    `rate`, and centred, so that it cannot drift (arXiv 2408.15664, Algorithm 1)."""
    mean = tokens_per_expert.mean(-1, keepdims=True)
    moved = bias + rate * jnp.sign(mean - tokens_per_expert)
    return moved - moved.mean(-1, keepdims=True)


def steer_threshold(p: Float[Array, "*L"], experts_per_token: Float[Array, ""], rule: config.Nucleus) -> Array:
    """The nucleus threshold after a step that gave tokens this many experts in the mean, float32 [*L] in (0, 1].

    Integral control of log p: while probabilities are uniform the number of experts is proportional to p, so the share
    `rule.p_rate` of a deviation is undone in a step for any number of experts; somewhat less once the router is sure.
    """
    assert rule.experts_per_token is not None
    factor = jnp.exp(rule.p_rate * (1.0 - experts_per_token / rule.experts_per_token))
    return jnp.clip(p * factor, 1e-4, 1.0)
