"""Validation: loss, perplexity, bits per byte and routing over held-out text."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jmoe import config
from jmoe.batch import Batch
from jmoe.config import InputError
from jmoe.data.prepare import Prepared
from jmoe.model.transformer import Transformer, router_states
from jmoe.telemetry import describe_routing
from jmoe.training import EvalSums, put_batch


def evaluate(
    eval_step: Callable[[Transformer, Batch], EvalSums],
    params: Transformer,
    batches: Iterable[Batch],
    prepared: Sequence[Prepared],
    settings: config.Config,
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Runs `eval_step` (`jmoe.training.make_eval_step`) over batches of host arrays and sums up.

    Args:
      params: of the model, on `mesh`.
      batches: of this host's rows, as `jmoe.data.pipeline.validation_batches` gives them.
      prepared: the packed sources the batches come from.
      settings: of the run; its sequence length serves to tell FLOPs.

    Returns:
      loss (nats/token), perplexity, bits_per_byte, unigram_entropy (nats/token), tokens (targets counted), and the
      routing of `jmoe.telemetry.describe_routing`. Bits per byte counts bytes by the sources' average bytes a token.

    Raises:
      InputError: no batch had a token to predict.
    """
    whole = None
    for batch in batches:
        # Summed on the host in float64: float32 would lose whole tokens after some tens of millions.
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), eval_step(params, put_batch(batch, mesh)))
        whole = sums if whole is None else jax.tree.map(np.add, whole, sums)
    if whole is None or not whole.targets:
        raise InputError("the validation text has no token to predict")
    loss = float(whole.sums.cross_entropy / whole.targets)
    routing = describe_routing(
        settings.model, settings.data.seq_len, whole.sums.stats, float(whole.tokens), router_states(params)
    )
    targets, size = sum(p.targets for p in prepared), sum(p.bytes for p in prepared)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss * targets / size / math.log(2),
        "unigram_entropy": sum(p.targets * p.unigram_entropy for p in prepared) / targets,
        "tokens": int(whole.targets),
        **routing,
    }
