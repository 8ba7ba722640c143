"""Balance losses from router statistics that are sums over the whole global batch.

Each is linear in the differentiable sums, given counts (which have no gradient) and the number of valid tokens. Losses
of micro-batches therefore add up to the loss of the batch, and so do their gradients.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmoe.model.router import RouterStats

TERMS = ("load_balance_loss", "sequence_balance_loss", "router_z_loss", "dynamic_loss", "parameter_penalty")


def terms(
    stats: RouterStats, tokens_per_expert: Float[Array, "*L C"], num_tokens: Float[Array, ""], widths: Sequence[int]
) -> tuple[Array, ...]:
    """Every loss of this file, in the order of `TERMS`; arguments as in `parameter_penalty`."""
    return (
        load_balance_loss(stats, tokens_per_expert, num_tokens),
        sequence_balance_loss(stats, num_tokens),
        router_z_loss(stats, num_tokens),
        dynamic_loss(stats, num_tokens),
        parameter_penalty(stats, tokens_per_expert, num_tokens, widths),
    )


def load_balance_loss(
    stats: RouterStats, tokens_per_expert: Float[Array, "*L C"], num_tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """C · Σ_i f_i Q_i, summed over layers: f_i share of assignments, Q_i mean probability (arXiv 2403.07652).

    Args:
      stats: sums over the tokens at hand, [*L, C] with any leading layer axes.
      tokens_per_expert: assignments over the whole global batch, [*L, C]; treated as constant.
      num_tokens: valid tokens in the whole global batch.
    """
    return parameter_penalty(stats, tokens_per_expert, num_tokens, (1,) * tokens_per_expert.shape[-1])


def parameter_penalty(
    stats: RouterStats, tokens_per_expert: Float[Array, "*L C"], num_tokens: Float[Array, ""], widths: Sequence[int]
) -> Float[Array, ""]:
    """C · Σ_i f_i h_i/h̄ · Q_i, summed over layers, h_i the width of choice i (arXiv 2408.10681): with equal widths
    exactly the load-balance loss.

    Args:
      stats, tokens_per_expert, num_tokens: as in `load_balance_loss`.
      widths: of each of the C choices, features.
    """
    counts = jax.lax.stop_gradient(tokens_per_expert)
    share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
    relative = jnp.array([w * len(widths) / sum(widths) for w in widths], jnp.float32)
    relative = relative.reshape((1,) * (share.ndim - 1) + relative.shape)
    return share.shape[-1] * jnp.sum(share * relative * stats.probability_per_expert) / num_tokens


def sequence_balance_loss(stats: RouterStats, num_tokens: Float[Array, ""]) -> Float[Array, ""]:
    """C · Σ_i f_i Q_i within each sequence, mean over tokens, summed over layers (arXiv 2412.19437, eq. 17-20, with f_i
    the share of assignments, so that balance is 1 here as above)."""
    return jnp.sum(stats.sequence_balance) / num_tokens


def router_z_loss(stats: RouterStats, num_tokens: Float[Array, ""]) -> Float[Array, ""]:
    """Mean squared log-partition of the router's logits, summed over layers (arXiv 2202.08906, eq. 5)."""
    return jnp.sum(stats.z_squared) / num_tokens


def dynamic_loss(stats: RouterStats, num_tokens: Float[Array, ""]) -> Float[Array, ""]:
    """Mean entropy of the tokens' router probabilities, summed over layers (arXiv 2403.07652), in nats."""
    return jnp.sum(stats.entropy) / num_tokens
