"""What a conversion is measured on, and by how much a model differs from the one it was made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jmoe import config
from jmoe.batch import Batch
from jmoe.data.pipeline import validation_batches
from jmoe.data.prepare import Prepared
from jmoe.model.attention import positions_in_row
from jmoe.model.transformer import Transformer
from jmoe.model.walk import apply, layers_of, walk
from jmoe.ops.cross_entropy import cross_entropy


def batches_of(prepared: Sequence[Prepared], tokens: int) -> list[Batch]:
    """Batches of the packed text with at least so many tokens in all, if there are as many; each of 4096 or a row."""
    seq_len = prepared[0].seq_len
    rows = max(1, 4096 // seq_len)
    limit = -(-tokens // (rows * seq_len))
    return list(validation_batches(prepared, batch_size=rows, seq_len=seq_len, limit=limit))


def random_batch(settings: config.Config, tokens: int = 4096) -> Batch:
    """Rows of tokens drawn at random, where there is no text."""
    seq_len = settings.data.seq_len
    shape = (max(1, tokens // seq_len), seq_len)
    drawn = np.random.default_rng(0).integers(0, settings.model.vocab_size, (shape[0], seq_len + 1), np.int32)
    ones = np.ones(shape, np.int32)
    return Batch(drawn[:, :-1], drawn[:, 1:], ones, np.asarray(positions_in_row(*shape)), ones > 0)


def mean_loss(params: Transformer, model: config.Model, batches: Sequence[Batch]) -> float:
    """Cross-entropy over the batches in float32, nats/token."""
    total = count = 0.0
    for batch in batches:
        *_, last = walk(params, model, batch)
        total += float(_loss(params, last.residual, batch))
        count += float(batch.loss_mask.sum())
    return total / max(count, 1.0)


class Difference(NamedTuple):
    """How one model differs from another of as many layers, over the tokens of a batch."""

    layers: dict[int, float]
    """by the index of each layer whose feed-forward differs in kind: ‖new(x) − old(x)‖ / ‖old(x)‖, x as the old model
    has it"""
    logits: float
    """largest difference of a logit over the largest of all logits"""
    losses: tuple[float, float]
    """of the old model and of the new one, nats/token"""


def difference(old: Transformer, new: Transformer, was: config.Model, now: config.Model, batch: Batch) -> Difference:
    """What replacing `old`, of architecture `was`, by `new`, of `now`, does; computed in float32."""
    valid, found, visit = jnp.asarray(batch.segment_ids > 0), {}, None
    for visit, (index, settings, layer) in zip(walk(old, was, batch), layers_of(new, now), strict=True):
        if settings != visit.settings:
            changed = apply(layer.feed_forward, visit.inputs, valid) - visit.outputs
            found[index] = float(_norm(changed, valid) / _norm(visit.outputs, valid))
    *_, last = walk(new, now, batch)
    assert visit is not None
    before, after = (params.logits(params.final_norm(x)) for params, x in ((old, visit.residual), (new, last.residual)))
    largest = [float(jnp.abs(logits * valid[..., None]).max()) for logits in (after - before, before)]
    count = max(float(batch.loss_mask.sum()), 1.0)
    losses = float(_loss(old, visit.residual, batch)) / count, float(_loss(new, last.residual, batch)) / count
    return Difference(found, largest[0] / largest[1], losses)


def _norm(x: Float[Array, "B S D"], valid: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x) * valid[..., None]))


@jax.jit
def _loss(params: Transformer, residual: Float[Array, "B S D"], batch: Batch) -> Array:
    """Cross-entropy summed over the targets, nats, of the residual stream after the last layer."""
    sums: Any = cross_entropy  # which custom_vjp leaves without a type
    hidden, chunk_tokens = params.final_norm(residual), config.Loss.chunk_tokens
    return sums(hidden, params.head_weight(), batch.targets, batch.loss_mask, chunk_tokens, z_weight=0.0)[1]
