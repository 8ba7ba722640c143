"""The training loss, from sums over tokens that are normalised once per global batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe import config
from jmoe.batch import Batch
from jmoe.model import balance
from jmoe.model.attention import Place
from jmoe.model.transformer import Stats, Transformer


class Sums(NamedTuple):
    """Sums over the tokens of one (micro-)batch; those of micro-batches add up to those of the batch."""

    cross_entropy: Array
    """float32 scalar: summed negative log-likelihood of the targets, nats."""
    z_squared: Array
    """float32 scalar: summed squared log-partition of the vocabulary softmax."""
    stats: Stats
    """router statistics of each MoE layer."""


class Totals(NamedTuple):
    """What the sums of a global batch are divided by; known before any gradient."""

    targets: Array
    """float32 scalar: targets that bear loss."""
    tokens: Array
    """float32 scalar: tokens that are not padding."""


def totals(batch: Batch) -> Totals:
    """Counts of a whole global batch; at least 1, so that a batch of padding has loss 0."""
    return Totals(
        jnp.maximum(batch.loss_mask.sum(dtype=jnp.float32), 1.0),
        jnp.maximum((batch.segment_ids > 0).sum(dtype=jnp.float32), 1.0),
    )


def cross_entropy(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
    chunk_tokens: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross-entropy and squared log-partition, float32, with logits for about `chunk_tokens` tokens at a time.

    The chunks run along the sequence, so that a sharded batch stays sharded. The backward pass computes a chunk's
    logits again instead of keeping them.

    Returns:
      Σ −log softmax(hidden · head)[target] over masked tokens, and Σ (log Σ_v exp logits)² over the same.
    """
    B, S, _ = hidden.shape
    length = max(1, min(S, chunk_tokens // B))
    chunks = -(-S // length)
    head = head.astype(hidden.dtype)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * length - S)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, chunks, length, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def chunk_sums(hidden, targets, mask):
        logits = jnp.einsum("BSD,DV->BSV", hidden, head, preferred_element_type=jnp.float32)
        log_partition = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (
            jnp.sum(log_partition - target_logits, where=mask),
            jnp.sum(log_partition**2, where=mask),
        )

    def body(sums, chunk):
        return jax.tree.map(jnp.add, sums, chunk_sums(*chunk)), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(body, (zero, zero), (split(hidden), split(targets), split(mask)))
    return sums


def hidden_states(params: Transformer, batch: Batch, settings: config.Config) -> tuple[Array, Stats]:
    """Hidden states [B, S, D] and router statistics of a (micro-)batch."""
    place = Place(batch.segment_ids, batch.positions, batch.segment_ids, batch.positions)
    hidden, stats, _ = params(batch.tokens, place, dtype=jnp.dtype(settings.dtype), remat=settings.remat)
    return hidden, stats


def forward(params: Transformer, batch: Batch, settings: config.Config) -> Sums:
    """Runs the model on a (micro-)batch and returns its sums."""
    hidden, stats = hidden_states(params, batch, settings)
    nll, z_squared = cross_entropy(
        hidden, params.head_weight(), batch.targets, batch.loss_mask, settings.loss.chunk_tokens
    )
    return Sums(nll, z_squared, stats)


def loss_terms(sums: Sums, counts: Stats, total: Totals, coefficients: config.Loss) -> tuple[Array, dict[str, Any]]:
    """The loss and its terms.

    Args:
      sums: of a batch or of one of its micro-batches; the loss is linear in them, given `counts` and `total`.
      counts: router statistics of the whole global batch, of which only the assignment counts are used.
      total: of the whole global batch.
      coefficients: of the terms.

    Returns:
      The loss, and each term before its coefficient by name; router terms are means over the MoE layers.
    """
    layers = [
        (own, whole.tokens_per_expert)
        for own_group, group in zip(sums.stats, counts, strict=True)
        for own, whole in zip(own_group, group, strict=True)
        if own is not None and whole is not None
    ]
    num_layers = max(1, sum(own.entropy.size for own, _ in layers))
    zero = jnp.zeros((), jnp.float32)
    terms = {
        "cross_entropy": sums.cross_entropy / total.targets,
        "z_loss": sums.z_squared / total.targets,
        "load_balance_loss": sum((balance.load_balance_loss(own, whole, total.tokens) for own, whole in layers), zero)
        / num_layers,
        "dynamic_loss": sum((balance.dynamic_loss(own, total.tokens) for own, _ in layers), zero) / num_layers,
    }
    loss = (
        terms["cross_entropy"]
        + coefficients.z_loss * terms["z_loss"]
        + coefficients.load_balance_loss * terms["load_balance_loss"]
        + coefficients.dynamic_loss * terms["dynamic_loss"]
    )
    return loss, terms
