"""Where the router sends the tokens: a figure over a training, and a table of one state."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

INK = "#444444"
GRID = "#e6e6e6"
DEAD = 0.01


def plot_routing(metrics_path: Path, output_path: Path, *, num_experts_active_max: int | None = None) -> bool:
    """Draws the routing of a training from its metrics.jsonl: experts per token, load imbalance, load per expert.

    Args:
      metrics_path: JSON lines; those of split "train" with `experts_per_token_by_layer` and `load_by_layer` are used.
      output_path: the PNG, 1400 pixels wide.
      num_experts_active_max: the most experts a token can get, drawn as a dashed line.

    Returns:
      Whether there was anything to draw: False, and nothing written, for a run without MoE layers.
    """
    records = _records(Path(metrics_path))
    if not records:
        return False
    steps = np.array([record["step"] for record in records])
    experts = np.array([record["experts_per_token_by_layer"] for record in records], float)
    imbalance = np.array([[max(load) * len(load) for load in record["load_by_layer"]] for record in records], float)
    loads = [np.array(load, float) for load in records[-1]["load_by_layer"]]
    layers = records[-1].get("moe_layers") or list(range(len(loads)))
    colors = colormaps["viridis"](np.linspace(0.0, 0.88, len(layers)))

    heights = (2.5, 0.7 + float(np.clip(0.17 * len(layers), 0.6, 3.2)))
    figure = Figure(figsize=(7.0, sum(heights)), dpi=200, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=heights)
    over_training = [figure.add_subplot(grid[0, column]) for column in (0, 1)]
    latest = figure.add_subplot(grid[1, :])

    _draw_lines(over_training[0], steps, experts, colors)
    _draw_lines(over_training[1], steps, imbalance, colors)
    if num_experts_active_max is not None:
        _draw_limit(over_training[0], float(num_experts_active_max), "most possible", "bottom")
    over_training[0].set_ylim(0.0, 1.1 * max(experts.max(), num_experts_active_max or 0.0))
    _draw_limit(over_training[1], 1.0, "balanced", "top")
    highest = max(1.1, imbalance.max())
    over_training[1].set_ylim(1.0 - 0.13 * (highest - 1.0), 1.0 + 1.06 * (highest - 1.0))
    if len(layers) > 1:
        _draw_layer_key(figure, over_training, layers, colors)
    _draw_heatmap(figure, latest, loads, layers)

    titles = (
        "Experts per token",
        "Load imbalance (busiest expert / mean)",
        f"Load per expert / mean, step {steps[-1]:,}",
    )
    for axes, letter, title in zip((*over_training, latest), "abc", titles, strict=True):
        axes.set_title(rf"$\bf{{{letter}}}$  {title}", loc="left", fontsize=9)
        axes.tick_params(labelsize=7, color=INK, labelcolor=INK)
    figure.savefig(output_path)
    return True


def _records(path: Path) -> list[dict[str, Any]]:
    """The training lines that tell of routing, without those of steps in which it was not finite."""
    records = []
    with path.open() as stream:
        for line in stream:
            record = json.loads(line)
            values = record.get("experts_per_token_by_layer")
            if record.get("split") == "train" and values and np.isfinite([float(value) for value in values]).all():
                records.append(record)
    return records


def _draw_limit(axes: Axes, limit: float, name: str, side: Literal["top", "bottom"]) -> None:
    """A dashed line with its name above it or, with `side` "top", hanging from it."""
    axes.axhline(limit, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        name,
        (0.985, limit),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2.5 if side == "bottom" else -2.5),
        textcoords="offset points",
        ha="right",
        va=side,
        fontsize=7,
        color=INK,
    )


def _draw_lines(axes: Axes, steps: np.ndarray, values: np.ndarray, colors: np.ndarray) -> None:
    """A line per layer of `values` [steps, layers], and their mean."""
    marker = "o" if len(steps) == 1 else ""
    for series, color in zip(values.T, colors, strict=True):
        axes.plot(steps, series, color=color, linewidth=1.2 if len(colors) <= 8 else 0.8, marker=marker, markersize=4)
    if len(colors) > 1:
        mean = values.mean(axis=1)
        axes.plot(steps, mean, color="white", linewidth=3.2, solid_capstyle="round")
        axes.plot(steps, mean, color="black", linewidth=1.8, marker="_" if marker else "", markersize=14)
        axes.annotate(
            "mean",
            (steps[-1], mean[-1]),
            xytext=(9 if marker else 4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            fontweight="bold",
        )
    axes.set_xlabel("Step", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    length = max(steps[-1] - steps[0], 1)
    axes.set_xlim(steps[0] - 0.02 * length, steps[-1] + 0.14 * length)  # room for the word "mean"
    axes.margins(y=0.1)
    if marker:
        axes.set_xticks(steps)
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _draw_layer_key(figure: Figure, axes: list[Axes], layers: list[int], colors: np.ndarray) -> None:
    """A colour bar of one block a layer, the first on top as in the heatmap."""
    edges = np.arange(len(layers) + 1) - 0.5
    blocks = ScalarMappable(cmap=ListedColormap(list(colors)), norm=BoundaryNorm(edges, len(layers)))
    bar = figure.colorbar(blocks, ax=axes, aspect=24, pad=0.02, spacing="uniform")
    bar.set_label("Layer", fontsize=8)
    _label_layers(bar.ax, layers)
    bar.ax.tick_params(which="both", length=0, labelsize=7, labelcolor=INK)
    bar.ax.invert_yaxis()
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _label_layers(axes: Axes, layers: list[int], offset: float = 0.0) -> None:
    every = -(-len(layers) // 12)
    axes.set_yticks(np.arange(0, len(layers), every) + offset, [str(layer) for layer in layers[::every]], minor=False)


def _draw_heatmap(figure: Figure, axes: Axes, loads: list[np.ndarray], layers: list[int]) -> None:
    """Load relative to an equal share, layer by expert; a layer of fewer experts leaves the end of its row empty."""
    relative = np.full((len(loads), max(map(len, loads))), np.nan)
    for row, load in enumerate(loads):
        relative[row, : len(load)] = load * len(load)
    highest = float(np.nanmax(relative))
    top = float(np.clip(highest, 2.0, 4.0))
    norm = TwoSlopeNorm(1.0, 0.0, top)
    mesh = axes.pcolormesh(relative, cmap="RdBu_r", norm=norm, edgecolors="white", linewidth=0.5)
    if relative.shape[1] <= 16 and len(layers) <= 16:
        for (row, column), value in np.ndenumerate(relative):
            if np.isfinite(value):
                color = "white" if abs(norm(value) - 0.5) > 0.28 else INK
                axes.text(column + 0.5, row + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=color)
    experts = relative.shape[1]
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if experts / n <= 16 or n == 512)
    axes.set_xticks(np.arange(0, experts, every) + 0.5, [str(expert) for expert in range(0, experts, every)])
    _label_layers(axes, layers, 0.5)
    axes.invert_yaxis()
    axes.set_xlabel("Expert", fontsize=8)
    axes.set_ylabel("Layer", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, aspect=14, pad=0.015, extend="max" if highest > top else "neither")
    bar.set_ticks([0.0, 0.5, 1.0, *np.arange(2.0, top + 0.01)])
    bar.ax.tick_params(labelsize=7, length=2, color=INK, labelcolor=INK)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def routing_table(routing: dict[str, Any]) -> str:
    """The routing of one state as lines of text, one per MoE layer and one for their mean; "" without MoE layers.

    `routing` holds `experts_per_token_by_layer`, `load_by_layer` and perhaps `moe_layers`, as in a metrics line. Load
    is told by busiest expert over mean, by its coefficient of variation (standard deviation over mean), and by the
    number of dead experts, those with less than a hundredth of an equal share.
    """
    experts = routing.get("experts_per_token_by_layer") or []
    if not experts:
        return ""
    relative = [np.array(load, float) * len(load) for load in routing["load_by_layer"]]
    names = [str(layer) for layer in routing.get("moe_layers") or range(len(experts))]
    rows = np.array([[n, x.max(), x.std(), (x < DEAD).sum()] for n, x in zip(experts, relative, strict=True)], float)
    lines = ["layer  experts/token  load max/mean  load CV  dead experts"]
    for name, row, load in zip(names, rows, relative, strict=True):
        dead = f"{row[3]:.0f} of {len(load)}"
        lines.append(f"{name:>5}  {row[0]:13.2f}  {row[1]:13.2f}  {row[2]:7.2f}  {dead:>12}")
    mean = rows.mean(axis=0)
    lines.append(f" mean  {mean[0]:13.2f}  {mean[1]:13.2f}  {mean[2]:7.2f}  {mean[3]:12.1f}")
    return "\n".join(lines)
