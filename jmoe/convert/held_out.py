"""What a conversion is measured on, and by how much a model differs from the one it was made of."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jmoe import config
from jmoe.batch import Batch
from jmoe.data.pipeline import validation_batches
from jmoe.data.prepare import Prepared, prepare
from jmoe.data.tokenizer import Tokenizer
from jmoe.flops import feed_forwards
from jmoe.model.attention import positions_in_row
from jmoe.model.transformer import Transformer
from jmoe.model.walk import apply, layers_of, walk


def prepare_text(settings: config.Config, tokenizer: Tokenizer, glob: str | None) -> tuple[Prepared, ...]:
    """The run's own held-out text, or that of files. Raises InputError where it cannot be read."""
    data = settings.data
    if glob is not None:
        data = dataclasses.replace(data, validation=(config.Files(glob=glob),))
    return prepare(data, tokenizer, "validation")


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
    valid, found = jnp.asarray(batch.segment_ids > 0), {}
    visit = None
    for visit, (index, settings, layer) in zip(walk(old, was, batch), layers_of(new, now), strict=True):
        if settings != visit.settings:
            changed = apply(layer.feed_forward, visit.inputs, valid) - visit.outputs
            found[index] = float(_norm(changed, valid) / _norm(visit.outputs, valid))
    assert visit is not None and len(feed_forwards(now)) == visit.index + 1
    logits = old.logits(old.final_norm(visit.residual))
    *_, last = walk(new, now, batch)
    after = new.logits(new.final_norm(last.residual))
    most = jnp.abs((after - logits) * valid[..., None]).max() / jnp.abs(logits * valid[..., None]).max()
    return Difference(found, float(most), (_loss(logits, batch), _loss(after, batch)))


def _norm(x: Float[Array, "B S D"], valid: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x) * valid[..., None]))


@jax.jit
def _mean_loss(logits, targets, mask):
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -jnp.sum(likelihood * mask) / jnp.maximum(mask.sum(), 1)


def _loss(logits: Float[Array, "B S V"], batch: Batch) -> float:
    return float(_mean_loss(logits, jnp.asarray(batch.targets), jnp.asarray(batch.loss_mask)))
