"""The training loss, from sums over tokens that are normalised once per global batch."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jmoe import config
from jmoe.batch import Batch
from jmoe.model import balance
from jmoe.model.attention import Place
from jmoe.model.transformer import MaxLogits, Outputs, Stats, Transformer
from jmoe.ops.cross_entropy import cross_entropy
from jmoe.sharding import TABLE, undivided


class Sums(NamedTuple):
    """Sums over the tokens of one (micro-)batch; those of micro-batches add up to those of the batch."""

    vocabulary_loss: Array
    """float32 scalar: cross_entropy + `Loss.z_loss` · z_squared, the one of these three that has a gradient."""
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


def run_layers(params: Transformer, batch: Batch, settings: config.Config) -> Outputs:
    """Hidden states and statistics of a (micro-)batch."""
    place = Place(batch.segment_ids, batch.positions, batch.segment_ids, batch.positions)
    return params.run(
        batch.tokens, place, dtype=jnp.dtype(settings.dtype), remat=settings.remat, transport=settings.transport
    )


def forward(params: Transformer, batch: Batch, settings: config.Config) -> tuple[Sums, MaxLogits]:
    """Runs the model on a (micro-)batch: its sums, and of each head the highest attention logit, [repeats, N]."""
    outputs = run_layers(params, batch, settings)
    loss, nll, z_squared = _cross_entropy(outputs.hidden, params.head_weight(), batch, settings.loss)
    return Sums(loss, nll, z_squared, outputs.stats), jax.tree.map(lambda rows: rows.max(1), outputs.max_logits)


def _cross_entropy(hidden: Array, head: Array, batch: Batch, settings: config.Loss) -> tuple[Array, ...]:
    """`cross_entropy` on the mesh in use, each device with its own rows: the head is gathered and its gradient summed
    once, not for every chunk."""
    sums: Any = partial(cross_entropy, chunk_tokens=settings.chunk_tokens, z_weight=settings.z_loss)
    if undivided():
        return sums(hidden, head, batch.targets, batch.loss_mask)

    # Gathered by hand: the gradient of that is a reduce-scatter, where XLA may make an all-reduce of it. Each device's
    # rows are a matrix of their own there, since of one matrix whose columns do not divide as it likes (50304) XLA for
    # TPU sums all rows on every device.
    axes = TABLE["embed"]

    def on_device(hidden, head, *arrays):
        head = jax.lax.all_gather(head, axes).reshape(-1, head.shape[1])
        return tuple(part[None] for part in sums(hidden, head, *arrays))

    by_row = PartitionSpec(TABLE["batch"])
    parts = jax.shard_map(
        on_device,
        in_specs=(by_row, PartitionSpec(axes), by_row, by_row),
        out_specs=by_row,
        axis_names=set(TABLE["batch"]),  # not tensor, which splits the vocabulary
        check_vma=False,
    )(hidden, head.astype(hidden.dtype), batch.targets, batch.loss_mask)
    return tuple(part.sum() for part in parts)


def loss_terms(sums: Sums, counts: Stats, total: Totals, settings: config.Config) -> tuple[Array, dict[str, Any]]:
    """The loss and its terms.

    Args:
      sums: of a batch or of one of its micro-batches; the loss is linear in them, given `counts` and `total`.
      counts: router statistics of the whole global batch, of which only the assignment counts are used.
      total: of the whole global batch.
      settings: the architecture, and the coefficients of the terms.

    Returns:
      The loss, and each term before its coefficient by name; router terms are means over the MoE layers.
    """
    layers = [
        (own, whole.tokens_per_expert, layer.expert_widths + (0,) * layer.identity_experts, group.repeats)
        for group, own_group, whole_group in zip(settings.model.layers, sums.stats, counts, strict=True)
        for layer, own, whole in zip(group.pattern, own_group, whole_group, strict=True)
        if isinstance(layer, config.MoE) and own is not None and whole is not None
    ]
    terms = {"cross_entropy": sums.cross_entropy / total.targets, "z_loss": sums.z_squared / total.targets}
    terms |= dict.fromkeys(balance.TERMS, jnp.zeros((), jnp.float32))
    num_layers = max(1, sum(repeats for *_, repeats in layers))
    for own, tokens_per_expert, widths, _ in layers:
        of_layer = balance.terms(own, tokens_per_expert, total.tokens, widths)
        for name, term in zip(balance.TERMS, of_layer, strict=True):
            terms[name] += term / num_layers
    weighted = (getattr(settings.loss, name) * terms[name] for name in balance.TERMS)
    return sum(weighted, sums.vocabulary_loss / total.targets), terms
