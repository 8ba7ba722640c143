"""What the experts of a run do on calibration text."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jmoe import config
from jmoe.batch import Batch
from jmoe.config import require
from jmoe.convert.held_out import batches_of
from jmoe.convert.runs import Run
from jmoe.data.prepare import prepare_held_out
from jmoe.flops import feed_forwards
from jmoe.language_model import LanguageModel
from jmoe.model.expert_parallel import local_experts
from jmoe.model.moe import MoE
from jmoe.model.router import one_hot
from jmoe.model.transformer import Transformer
from jmoe.model.walk import walk


class Observed(NamedTuple):
    """Sums over the calibration tokens in one layer of E experts."""

    tokens: Array
    """float32 scalar: tokens"""
    assignments: Array
    """float32 [E]: tokens that went to each expert"""
    weight: Array
    """float32 [E]: combine weights"""
    saliency: Array
    """float32 [E]: combine weights, divided by their sum over the token's experts, times ‖expert(x)‖₂"""
    logits: Array
    """float32 [E, E]: products of the router's logits"""


def observe(params: Transformer, model: config.Model, batches: Iterable[Batch]) -> dict[int, Observed]:
    """What the experts of each MoE layer do on the batches, by the layer's index; float32."""
    found: dict[int, Observed] = {}
    for batch in batches:
        for visit in walk(params, model, batch):
            if isinstance(visit.layer.feed_forward, MoE):
                sums = _observe(visit.layer.feed_forward, visit.inputs, batch.segment_ids > 0)
                sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
                found[visit.number] = jax.tree.map(np.add, found[visit.number], sums) if visit.number in found else sums
    return found


@jax.jit
def _observe(moe: MoE, inputs: Float[Array, "B S D"], valid: Bool[Array, "B S"]) -> Observed:
    routing, E = moe.router(inputs, valid), moe.router.moe.num_experts
    (T, K), tokens = routing.expert_ids.shape, inputs.reshape(-1, inputs.shape[-1])
    # Each slot is a token of its own with one expert, so that the outputs are the experts' and not their sum.
    rows, ids = jnp.repeat(tokens, K, axis=0), routing.expert_ids.reshape(T * K, 1)
    outputs = local_experts(rows, ids, jnp.ones((T * K, 1)), moe.experts.weights())
    norms = jnp.linalg.norm(outputs.astype(jnp.float32), axis=-1).reshape(T, K)
    weights = routing.combine_weights
    shares = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-20)
    chosen = one_hot(routing.expert_ids, E)
    logits = (tokens @ moe.router.weight[...][:, :E]) * valid.reshape(-1, 1)
    return Observed(
        tokens=valid.sum(dtype=jnp.float32),
        assignments=chosen.sum((0, 1), dtype=jnp.float32),
        weight=jnp.sum(chosen * weights[..., None], (0, 1)),
        saliency=jnp.sum(chosen * (shares * norms)[..., None], (0, 1)),
        logits=logits.T @ logits,
    )


class Calibrated(NamedTuple):
    """A run to compress and what its experts do."""

    run: Run
    params: Transformer
    moes: dict[int, config.MoE]
    observed: dict[int, Observed]
    held_out: list[Batch]
    """what the losses are measured on"""
    text: str
    """in words, what it was calibrated and is measured on"""


def calibrate(run_dir: str, step: int | None, glob: str | None, tokens: int) -> Calibrated:
    """Runs a model over calibration text and sums up what its experts do. Raises InputError for a dense model, or
    where there is no text."""
    run = Run(Path(run_dir), step)
    settings = feed_forwards(run.settings.model)
    moes = {i: each for i, each in enumerate(settings) if isinstance(each, config.MoE)}
    require(bool(moes), f"{run_dir} is dense: it has no experts")
    batches = batches_of(prepare_held_out(run.settings.data, run.tokenizer, glob), 2 * tokens)
    given, held_out = (batches[::2], batches[1::2]) if len(batches) > 1 else (batches, batches)
    count = [f"{sum(int((b.segment_ids > 0).sum()) for b in part):,}" for part in (given, held_out)]
    others = "others" if len(batches) > 1 else "the same"
    text = f"calibrated on {count[0]} tokens of {glob or 'the held-out text'}, losses over {count[1]} {others}"
    params = LanguageModel.load(run_dir, step=run.step).params
    return Calibrated(run, params, moes, observe(params, run.settings.model, given), held_out, text)
