"""The panels that routing.png is made of: arrays in, drawn on axes."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

INK = "#444444"
PALE = "#8a8a8a"
GRID = "#e6e6e6"


def draw_facts(axes: Axes, facts: list[tuple[str, str]]) -> None:
    """A strip of values with their names beneath, each as wide as its text."""
    axes.set_axis_off()
    room = 126.0  # characters of a name across the picture
    widths = np.array([6 + max(1.75 * len(value), len(name)) for value, name in facts])
    scale = min(1.0, room / widths.sum())
    starts = np.cumsum(widths) - widths
    for start, (value, name) in zip(starts * scale / room, facts, strict=True):
        for text, size, down, color, weight in ((value, 10, 0, "black", "bold"), (name, 7, 14, PALE, "normal")):
            axes.annotate(
                text,
                (start, 1.0),
                xycoords="axes fraction",
                xytext=(0, -down * scale),
                textcoords="offset points",
                va="top",
                fontsize=size * scale,
                fontweight=weight,
                color=color,
            )


def draw_limit(axes: Axes, limit: float, name: str) -> None:
    """A dashed line, its name hanging from it."""
    low, high = axes.get_ylim()
    room = 0.15 * (max(high, limit) - min(low, limit))
    axes.set_ylim(min(low, limit - room), max(high, limit + room / 4))
    axes.axhline(limit, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        name,
        (0.985, limit),
        xycoords=("axes fraction", "data"),
        xytext=(0, -2.5),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=6.5,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
        zorder=2.2,  # above the lines, below the axes
    )


def draw_lines(axes: Axes, steps: np.ndarray, values: np.ndarray, colors: np.ndarray) -> None:
    """A line per layer of `values` [steps, layers], and their mean."""
    marker = "o" if len(steps) == 1 else ""
    for series, color in zip(values.T, colors, strict=True):
        axes.plot(steps, series, color=color, linewidth=1.2 if len(colors) <= 8 else 0.8, marker=marker, markersize=4)
    if len(colors) > 1:
        mean = np.nanmean(values, axis=1)
        axes.plot(steps, mean, color="white", linewidth=3.0, solid_capstyle="round")
        axes.plot(steps, mean, color="black", linewidth=1.6, marker="_" if marker else "", markersize=14)
        axes.annotate(
            "mean",
            (steps[-1], mean[-1]),
            xytext=(9 if marker else 3, 0),
            textcoords="offset points",
            va="center",
            fontsize=6.5,
            fontweight="bold",
        )
    axes.set_xlabel("Step", fontsize=7, labelpad=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7, color=INK, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    length = max(steps[-1] - steps[0], 1)
    axes.set_xlim(steps[0] - 0.02 * length, steps[-1] + 0.2 * length)  # room for the word "mean"
    axes.margins(y=0.1)
    if marker:
        axes.set_xticks(steps)
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def draw_layer_key(figure: Figure, axes: list[Axes], layers: list[int], colors: np.ndarray, rows: int) -> None:
    """A colour bar of one block a layer, the first on top as in the heat maps."""
    edges = np.arange(len(layers) + 1) - 0.5
    blocks = ScalarMappable(cmap=ListedColormap(list(colors)), norm=BoundaryNorm(edges, len(layers)))
    bar = figure.colorbar(blocks, ax=axes, aspect=24 * rows, pad=0.015, spacing="uniform")
    bar.set_label("Layer", fontsize=7)
    _label_layers(bar.ax, layers)
    bar.ax.tick_params(which="both", length=0, labelsize=7, labelcolor=INK)
    bar.ax.invert_yaxis()
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _label_layers(axes: Axes, layers: list[int], offset: float = 0.0) -> None:
    every = -(-len(layers) // 12)
    axes.set_yticks(np.arange(0, len(layers), every) + offset, [str(layer) for layer in layers[::every]], minor=False)


def roomy(table: np.ndarray) -> bool:
    """Whether each cell has room for a number."""
    return max(table.shape) <= 16


def draw_heatmap(
    figure: Figure,
    axes: Axes,
    table: np.ndarray,
    layers: list[int],
    text: np.ndarray,
    *,
    first: int = 0,
    cmap: str,
    norm: Normalize,
) -> Colorbar:
    """A table [layers, columns] as colours, with text in its cells, its columns numbered from `first`; returns its
    colour bar."""
    narrow = max(table.shape) > 64
    mesh = axes.pcolormesh(table, cmap=cmap, norm=norm, edgecolors="white", linewidth=0.0 if narrow else 0.5)
    for (row, column), told in np.ndenumerate(text):
        if told:
            dark = np.dot(mesh.cmap(norm(table[row, column]))[:3], (0.299, 0.587, 0.114)) < 0.55
            axes.text(
                column + 0.5,
                row + 0.5,
                told,
                ha="center",
                va="center",
                fontsize=6 if roomy(table) else 4,
                color="white" if dark else INK,
            )
    columns = table.shape[1]
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if columns / n <= 16 or n == 512)
    axes.set_xticks(np.arange(0, columns, every) + 0.5, [str(first + column) for column in range(0, columns, every)])
    _label_layers(axes, layers, 0.5)
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=7, labelcolor=INK)
    axes.spines[:].set_visible(False)
    beyond = "max" if np.nanmax(table) > (norm.vmax or 0.0) else "neither"
    bar = figure.colorbar(mesh, ax=axes, aspect=float(np.clip(1.6 * len(layers), 12, 34)), pad=0.015, extend=beyond)
    bar.ax.tick_params(labelsize=7, length=2, color=INK, labelcolor=INK)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return bar
