"""Balance losses from router statistics that are sums over the whole global batch.

Each is linear in the differentiable sums, given counts (which have no gradient) and the number of valid tokens. Losses
of micro-batches therefore add up to the loss of the batch, and so do their gradients.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmoe.model.router import RouterStats


def load_balance_loss(
    stats: RouterStats, tokens_per_expert: Float[Array, "*L E"], num_tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """E · Σ_i f_i Q_i, summed over layers: f_i share of assignments, Q_i mean probability (arXiv 2403.07652).

    Args:
      stats: sums over the tokens at hand, [*L, E] with any leading layer axes.
      tokens_per_expert: assignments over the whole global batch, [*L, E]; treated as constant.
      num_tokens: valid tokens in the whole global batch.
    """
    counts = jax.lax.stop_gradient(tokens_per_expert)
    share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
    return share.shape[-1] * jnp.sum(share * stats.probability_per_expert) / num_tokens


def dynamic_loss(stats: RouterStats, num_tokens: Float[Array, ""]) -> Float[Array, ""]:
    """Mean entropy of the tokens' router probabilities, summed over layers (arXiv 2403.07652), in nats."""
    return jnp.sum(stats.entropy) / num_tokens
