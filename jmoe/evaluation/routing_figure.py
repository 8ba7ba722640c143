"""What the routers did over a training, as a picture: routing.png."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from jmoe.evaluation.panels import draw_facts, draw_heatmap, draw_layer_key, draw_limit, draw_lines, roomy
from jmoe.telemetry import DEAD

LINES = 1000
"""About so many lines of a long log are read: more than the picture has pixels for."""

OVER_TRAINING = {
    "experts_per_token": "Experts per token",
    "load_max_over_mean": "Busiest expert / mean load",
    "router_entropy": "Router entropy (nats)",
    "nucleus_p": "Nucleus threshold p",
    "router_bias_range": "Router bias, highest − lowest",
    "dropped_per_token": "Dropped per token",
}
"""What is drawn over the steps, by its name in the log; constant numbers of experts and drops of none are not."""


def plot_routing(metrics_path: Path, output_path: Path) -> bool:
    """Draws the routing of a training from its metrics.jsonl: its course over the steps, a line per MoE layer, and at
    the latest step how many experts tokens go to and the load of each expert.

    Args:
      metrics_path: JSON lines, as `jmoe.telemetry.describe_routing` fills those of split "train".
      output_path: the PNG, 1400 pixels wide.

    Returns:
      Whether there was anything to draw: False, and nothing written, for a run without MoE layers.
    """
    records = _records(Path(metrics_path))
    if not records:
        return False
    latest, steps = records[-1], np.array([record["step"] for record in records])
    layers = latest["moe_layers"]
    colors = colormaps["viridis"](np.linspace(0.0, 0.88, len(layers)))
    courses = _courses(records)
    counts = latest["experts_per_token_histogram_by_layer"] if "experts_per_token" in courses else None

    columns = 2 if len(courses) in (2, 4) else 3
    rows = -(-len(courses) // columns)
    heights = (0.3, 1.95 * rows, 0.75 + float(np.clip(0.19 * len(layers), 0.6, 3.4)))
    figure = Figure(figsize=(7.0, sum(heights)), dpi=200, layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=heights)
    draw_facts(figure.add_subplot(grid[0]), _facts(latest, courses))

    cells = grid[1].subgridspec(rows, columns)
    over_training = [figure.add_subplot(cells[divmod(index, columns)]) for index in range(len(courses))]
    for axes, (name, values) in zip(over_training, courses.items(), strict=True):
        draw_lines(axes, steps, values, colors)
        axes.set_title(OVER_TRAINING[name], loc="left", fontsize=8.5)
        if name in ("experts_per_token", "dropped_per_token"):
            axes.set_ylim(0.0, 1.1 * np.nanmax(values))
    drawn = dict(zip(courses, over_training, strict=True))
    draw_limit(drawn["load_max_over_mean"], 1.0, "balanced")
    choices = {len(load) for load in latest["load_by_layer"]}
    if len(choices) == 1 and choices != {1}:
        draw_limit(drawn["router_entropy"], float(np.log(choices.pop())), "uniform")
    if len(layers) > 1:
        draw_layer_key(figure, over_training, layers, colors, rows)

    loads = _table(latest["load_by_layer"])
    loads *= np.isfinite(loads).sum(axis=1, keepdims=True)
    if counts is None:
        of_counts, of_loads = None, figure.add_subplot(grid[2])
    else:
        shares = _table(counts)
        met = np.flatnonzero(np.nanmax(shares, axis=0))
        first, shares = int(met[0]), shares[:, met[0] : met[-1] + 1]
        part = float(np.clip(shares.shape[1] / (shares.shape[1] + loads.shape[1]), 0.35, 0.6))
        pair = grid[2].subgridspec(1, 2, width_ratios=(part, 1 - part))
        of_counts, of_loads = figure.add_subplot(pair[0]), figure.add_subplot(pair[1])
        _draw_counts(figure, of_counts, shares, layers, first)
    (of_loads if of_counts is None else of_counts).set_ylabel("Layer", fontsize=7, labelpad=2)
    _draw_loads(figure, of_loads, loads, layers)
    of_loads.set_title(f"Load per expert / mean, step {steps[-1]:,}", loc="left", fontsize=8.5)
    identity = "identity_per_token_by_layer" in latest
    of_loads.set_xlabel("Expert, then identity experts" if identity else "Expert", fontsize=7, labelpad=1)
    figure.savefig(output_path)
    return True


def _draw_counts(figure: Figure, axes: Axes, shares: np.ndarray, layers: list[int], first: int) -> None:
    """Shares of the tokens, layer by number of experts, of which the columns tell `first` and on."""
    norm = Normalize(0.0, float(np.nanmax(shares)))
    text = np.where(shares >= 0.005, np.char.mod("%.0f", 100 * np.nan_to_num(shares)), "<1")
    text = np.where((shares > 0) & roomy(shares), text, "")
    bar = draw_heatmap(figure, axes, shares, layers, text, first=first, cmap="Greens", norm=norm)
    axes.set_title("Experts of a token, % of tokens", loc="left", fontsize=8.5)
    axes.set_xlabel("Number of experts", fontsize=7, labelpad=1)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))


def _draw_loads(figure: Figure, axes: Axes, loads: np.ndarray, layers: list[int]) -> None:
    """Load over an equal share, layer by expert, dead experts crossed out; a layer of fewer experts leaves the end of
    its row empty."""
    top = float(np.clip(np.nanmax(loads), 2.0, 4.0))
    text = np.where(np.isfinite(loads) & roomy(loads), np.char.mod("%.1f", np.nan_to_num(loads)), "")
    text = np.where(loads < DEAD, "×", text)
    bar = draw_heatmap(figure, axes, loads, layers, text, cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, top))
    bar.set_ticks([0.0, 0.5, 1.0, *np.arange(2.0, top + 0.01)])


# ------------------------------------------------------------------------------------------------------- from the log


def _records(path: Path) -> list[dict[str, Any]]:
    """The training lines that tell of routing, without those of steps that were not finite or had no token; thinned."""
    with path.open("rb") as stream:
        last = sum(1 for _ in stream) - 1
    every = 1 + last // LINES
    records = []
    with path.open() as stream:
        for number, line in enumerate(stream):
            # Two neighbours each time: one of them may be a validation.
            if (last - number) % every > 1:
                continue
            record = json.loads(line)
            if record["split"] == "train" and "moe_layers" in record and _can_be_drawn(record):
                records.append(record)
    return records


def _can_be_drawn(record: dict[str, Any]) -> bool:
    imbalance, *others = (
        np.array(record[f"{name}_by_layer"], float)
        for name in ("load_max_over_mean", "experts_per_token", "router_entropy")
    )
    return bool((imbalance > 0).all()) and all(np.isfinite(values).all() for values in (imbalance, *others))


def _courses(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What changed over the steps, by name: [steps, layers], NaN for layers that do not have it."""
    found = {}
    for name in OVER_TRAINING:
        if f"{name}_by_layer" in records[-1]:
            found[name] = np.array([record[f"{name}_by_layer"] for record in records], float)
    if not found["dropped_per_token"].any():
        del found["dropped_per_token"]
    # A layer that sends some tokens to fewer experts than others.
    if all(max(shares) == 1.0 for record in records for shares in record["experts_per_token_histogram_by_layer"]):
        del found["experts_per_token"]
    return found


def _table(rows: list[list[float]]) -> np.ndarray:
    """Rows of different lengths, filled up with NaN."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


def _facts(record: dict[str, Any], courses: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """What is told in words: value and name; of what is drawn besides, the range over the layers."""
    short = EngFormatter(places=1, sep="")
    choices = sum(map(len, record["load_by_layer"]))
    facts = [
        (f"{record['experts_per_token']:.2f}", "experts per token"),
        (f"{short(record['activated_parameters'])} of {short(record['parameters'])}", "parameters activated"),
        (
            f"{short(record['activated_flops_per_token'])} of {short(record['flops_per_token'])}",
            "training FLOPs per token",
        ),
        (f"{sum(record['dead_experts_by_layer']):,} of {choices:,}", "dead experts"),
    ]
    ranges = {"dropped_per_token": "dropped", "router_bias_range": "bias range", "nucleus_p": "nucleus p"}
    for name, told in ranges.items():
        if name in courses:
            low, high = (f"{end(courses[name][-1]):.2g}" for end in (np.nanmin, np.nanmax))
            facts.append((low if low == high else f"{low}–{high}", told))
    return facts
