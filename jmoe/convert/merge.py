"""merge: experts that matter little become part of others, `python -m jmoe.convert merge RUN OUT [--flag value ...]`.

M-SMoE (arXiv 2310.01334): the experts that most tokens go to are dominant; every other one joins the dominant one that
the router treats most alike, and the experts of a group become their mean, weighed by how many tokens go to each.
Before that the hidden units of a joining expert are put in the order in which they fit those of the dominant one best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment  # JAX needs scipy anyway

from jmoe import config, recipe
from jmoe.convert import compress
from jmoe.convert.calibration import Observed, calibrate
from jmoe.convert.compress import PLACES, Group, choose, expert, parse_counts, write
from jmoe.convert.layers import ReadLayer, by_layer
from jmoe.folder import check_new


@dataclass(frozen=True)
class Options(compress.Options):
    """Flags of the command."""

    method: Literal["m-smoe"] = "m-smoe"
    """how [name]"""
    align: bool = True
    """the hidden units are put in order before a mean is taken [switch]"""


def similarity(observed: Observed) -> Float[np.ndarray, "E E"]:
    """Cosine between the router's logits of two experts over the calibration tokens."""
    products = np.asarray(observed.logits)
    norms = np.maximum(np.sqrt(np.diag(products)), 1e-20)
    return products / norms[:, None] / norms[None, :]


def partners(moe: config.MoE, observed: Observed, dominant: Sequence[int]) -> dict[int, list[int]]:
    """For each dominant expert those that join it: each expert joins the most similar dominant one of its width. An
    expert without any of its width is left out."""
    alike, found = similarity(observed), {e: [] for e in dominant}
    for e, width in enumerate(moe.expert_widths):
        to = [d for d in dominant if moe.expert_widths[d] == width]
        if e not in found and to:
            found[max(to, key=lambda d: alike[e, d])].append(e)
    return found


def unit_order(
    ours: tuple[np.ndarray, np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> Int[np.ndarray, " F"]:
    """The order of `theirs` in which each hidden unit fits that of `ours` at its place best: the assignment with the
    largest sum of inner products of their weights (arXiv 2209.04836, §3).

    Each is gate [D, F], up [D, F] and down [F, D] of an expert.
    """
    ours_units, their_units = (np.concatenate([gate.T, up.T, down], axis=1) for gate, up, down in (ours, theirs))
    return linear_sum_assignment(ours_units @ their_units.T, maximize=True)[1]


def merged(
    layer: int, moe: config.MoE, observed: Observed, dominant: Sequence[int], read: ReadLayer, align: bool
) -> list[Group]:
    """The groups of a layer: each dominant expert with those that join it."""
    count, groups = np.asarray(observed.assignments), []
    read = lru_cache(maxsize=3 * len(set(moe.expert_widths)))(read)  # the layer's matrices

    def matrices(e):
        gate, up, down = (expert(read, layer, moe, e, matrix) for matrix in ("gate", "up", "down"))
        return gate, up, down

    order: Callable[[int, int], np.ndarray | None]
    order = (lambda d, e: unit_order(matrices(d), matrices(e))) if align else (lambda d, e: None)
    for d, others in partners(moe, observed, dominant).items():
        members = (d, *others)
        weights = np.maximum(count[list(members)], 1e-6)  # of experts without tokens the plain mean
        shares = tuple((weights / weights.sum()).tolist())
        groups.append(Group(members, shares, (None, *(order(d, e) for e in others))))
    return groups


def main(argv: list[str]) -> None:
    """The command. Raises InputError before anything is written."""
    (run_dir, out), options = recipe.positional_arguments(argv, Options(), PLACES)
    check_new(Path(out))
    calibrated = calibrate(run_dir, options.step, options.calibrate, options.tokens)
    counts = parse_counts(options.layers, list(calibrated.moes))
    scores = {layer: np.asarray(observed.assignments) for layer, observed in calibrated.observed.items()}
    dominant = choose(calibrated.moes, scores, options.keep, options.by, counts)
    read = by_layer(calibrated.run.settings.model, calibrated.run.read)
    groups = {
        layer: merged(layer, moe, calibrated.observed[layer], dominant[layer], read, options.align)
        for layer, moe in calibrated.moes.items()
    }
    write(out, {"from": run_dir, "options": recipe.to_dict(options)}, calibrated, groups)
