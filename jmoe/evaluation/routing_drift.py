"""How routing changes from checkpoint to checkpoint, on the same tokens: tables and the picture drift.png."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jmoe import config
from jmoe.batch import Batch
from jmoe.evaluation.panels import draw_layer_key, draw_limit, draw_lines
from jmoe.model.moe import MoE
from jmoe.model.router import one_hot
from jmoe.model.transformer import Transformer
from jmoe.model.walk import layers_of, walk

SETTLED = 0.9
"""Routing has settled at the first checkpoint from which on neighbours agree on at least this share of the choices."""


def chosen_experts(params: Transformer, model: config.Model, batches: Sequence[Batch]) -> dict[int, np.ndarray]:
    """Which experts each token goes to, bool [T, E] by MoE layer; padding is left out. Computed in float32."""
    found: dict[int, list[np.ndarray]] = {}
    for batch in batches:
        valid = batch.segment_ids.reshape(-1) > 0
        for visit in walk(params, model, batch):
            if isinstance(visit.layer.feed_forward, MoE):
                chosen = _chosen(visit.layer.feed_forward.router, visit.inputs)
                found.setdefault(visit.number, []).append(np.asarray(chosen)[valid])
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


@jax.jit
def _chosen(router, inputs):
    routing = router(inputs, jnp.ones(inputs.shape[:2], bool))
    return one_hot(routing.expert_ids, router.moe.num_experts).any(1)


def overlap(a: Bool[np.ndarray, "T E"], b: Bool[np.ndarray, "T E"]) -> float:
    """Share of the choices that two routings of the same tokens have in common: 2 Σ |a ∩ b| / Σ (|a| + |b|). For top-k
    that is |a ∩ b| / k, the router saturation of OLMoE (arXiv 2409.02060, §5.1) where `b` is the last checkpoint."""
    return 2.0 * float((a & b).sum()) / max(int(a.sum()) + int(b.sum()), 1)


def chance(a: Bool[np.ndarray, "T E"], b: Bool[np.ndarray, "T E"]) -> float:
    """`overlap` expected if the tokens of one routing were shuffled: what equal loads alone have in common."""
    return 2.0 * float(a.sum(0) @ (b.sum(0) / len(b))) / max(int(a.sum()) + int(b.sum()), 1)


def expert_similarity(params: Transformer, model: config.Model) -> dict[int, float]:
    """Mean cosine between the weights of two experts of one width, by MoE layer; NaN where there are no two."""
    found = {}
    for index, _, layer in layers_of(params, model):
        if not isinstance(layer.feed_forward, MoE):
            continue
        total, pairs = 0.0, 0
        for bucket in layer.feed_forward.experts.weights():
            E = bucket.gate.shape[0]
            total, pairs = total + float(_summed_cosines(bucket)), pairs + E * (E - 1)
        found[index] = total / pairs if pairs else float("nan")
    return found


@jax.jit
def _summed_cosines(bucket):
    """Σ over pairs of different experts, each both ways: |Σ of the unit vectors|² − E."""
    squares = sum(jnp.sum(matrix**2, (1, 2)) for matrix in bucket)
    norms = jnp.sqrt(squares)[:, None, None]
    return sum(jnp.sum(jnp.sum(matrix / norms, 0) ** 2) for matrix in bucket) - len(bucket.gate)


class Drift(NamedTuple):
    """How routing changed over `steps`, each table [steps, layers]."""

    steps: list[int]
    layers: list[int]
    saturation: Float[np.ndarray, "C L"]
    """`overlap` with the last of the checkpoints"""
    with_next: Float[np.ndarray, "C L"]
    """`overlap` with the checkpoint after it; NaN for the last"""
    by_chance: Float[np.ndarray, "C L"]
    """`chance` for saturation"""
    similarity: Float[np.ndarray, "C L"]
    """`expert_similarity`"""

    def settled(self, threshold: float = SETTLED) -> list[int | None]:
        """For each layer the first step from which on neighbouring checkpoints agree on at least `threshold` of the
        choices; None where the last two do not, or there are no two. It depends on how far the checkpoints are apart,
        and a learning rate that decays settles any routing."""
        found = []
        for agreed in threshold <= self.with_next[:-1].T:
            changed = np.flatnonzero(~agreed)
            first = changed[-1] + 1 if len(changed) else 0
            found.append(self.steps[first] if first < len(agreed) else None)
        return found

    def as_json(self, threshold: float = SETTLED) -> dict[str, Any]:
        """Plain values; NaN as None."""
        tables = {
            name: [[None if np.isnan(x) else round(float(x), 6) for x in row] for row in getattr(self, name)]
            for name in ("saturation", "with_next", "by_chance", "similarity")
        }
        return {"steps": self.steps, "moe_layers": self.layers, **tables, "settled": self.settled(threshold)}


def drift_table(drift: Drift, threshold: float = SETTLED) -> str:
    """Lines of text: for each layer its saturation at some of the steps, then how much the last two checkpoints agree,
    what chance would give, the similarity of its experts at the first and last step, and when it settled."""
    count = len(drift.steps)
    told = np.unique(np.linspace(0, max(count - 2, 0), min(count, 8)).astype(int))  # at the last it is 1
    head = ["layer", *(str(drift.steps[c]) for c in told), "by chance", "last two", "similarity", "settled"]
    rows = []
    for j, (layer, settled) in enumerate(zip(drift.layers, drift.settled(threshold), strict=True)):
        rows.append([str(layer), *(f"{drift.saturation[c, j]:.2f}" for c in told)])
        rows[-1].append(f"{drift.by_chance[0, j]:.2f}")
        rows[-1].append(f"{drift.with_next[-2, j]:.2f}" if count > 1 else "-")
        rows[-1].append(f"{drift.similarity[0, j]:.2f} → {drift.similarity[-1, j]:.2f}")
        rows[-1].append("no" if settled is None else str(settled))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(
        [
            f"share of the choices in common with step {drift.steps[-1]}, by step (router saturation):",
            *lines,
            f"settled: the first step from which on neighbouring checkpoints agree on at least {threshold:.0%}",
        ]
    )


def plot_drift(drift: Drift, output_path: Path, threshold: float = SETTLED) -> None:
    """Draws saturation, agreement of neighbours and similarity of the experts over the steps, a line per layer; the
    PNG is 1400 pixels wide."""
    colors = colormaps["viridis"](np.linspace(0.0, 0.88, len(drift.layers)))
    figure = Figure(figsize=(7.0, 2.3), dpi=200, layout="constrained")
    panels = list(figure.subplots(1, 3))
    steps = np.array(drift.steps)
    titles = ("Choices shared with the last", "Choices shared with the next", "Cosine of two experts")
    tables = (drift.saturation, drift.with_next, drift.similarity)
    for axes, title, table in zip(panels, titles, tables, strict=True):
        drawn = ~np.isnan(table).all(axis=1)
        if drawn.any():
            draw_lines(axes, steps[drawn], table[drawn], colors)
        axes.set_title(title, loc="left", fontsize=8.5)
    low, high = panels[2].get_ylim()  # what is nearly nothing is drawn as that
    panels[2].set_ylim(min(low, -0.01), max(high, 0.1))
    for axes in panels[:2]:
        axes.set_ylim(0.0, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    draw_limit(panels[0], float(np.mean(drift.by_chance)), "by chance, mean")
    draw_limit(panels[1], threshold, "settled")
    if len(drift.layers) > 1:
        draw_layer_key(figure, panels, drift.layers, colors, 1)
    figure.savefig(output_path)
