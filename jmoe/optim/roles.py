"""What a parameter is to the optimiser, from the logical axes that it was declared with."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from jmoe import config
from jmoe.sharding import is_variable, logical_axes

# By the axes that are left without those along which parameters are stacked. Buffers have no gradient.
STACKED = ("layers", "expert", "bucket")
ROLES: Mapping[tuple[str, ...], config.Role | Literal["buffer"]] = {
    ("vocab", "embed"): "embedding",
    ("embed", "vocab"): "head",
    ("embed",): "norm",
    ("head_dim",): "norm",
    ("heads",): "norm",
    ("kv_heads",): "norm",
    ("embed", "router"): "router",
    ("embed", "heads", "head_dim"): "attention",
    ("embed", "kv_heads", "head_dim"): "attention",
    ("heads", "head_dim", "embed"): "attention",
    ("embed", "mlp"): "feed_forward",
    ("mlp", "embed"): "feed_forward",
    ("embed", "expert_mlp"): "experts",
    ("expert_mlp", "embed"): "experts",
    ("router",): "buffer",
    (): "buffer",
}


def role(axes: tuple[str, ...]) -> config.Role | Literal["buffer"]:
    """The role of a parameter with these logical axes."""
    return ROLES[tuple(axis for axis in axes if axis not in STACKED)]


def factor(by_role: config.ByRole, axes: tuple[str, ...]) -> float:
    """The factor for a parameter with these logical axes; 0 for buffers."""
    return getattr(by_role, role(axes), 0.0)


class Sides(NamedTuple):
    """Which dimensions of a parameter are the rows of its matrices and which the columns; along the others they are
    stacked. Weights stand on the right, x · W: rows are summed over, each column is an output."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of each matrix of a parameter of this shape."""
        rows, columns = (math.prod(shape[place] for place in places) for places in self)
        return rows, columns


def sides(axes: tuple[str, ...], heads: Literal["together", "apart"]) -> Sides:
    """The sides of the matrices of a parameter with these logical axes, one of which is `embed`."""
    batch = (*STACKED, "heads", "kv_heads") if heads == "apart" else STACKED
    own = tuple(place for place, axis in enumerate(axes) if axis not in batch)
    rows = 1 if axes[own[0]] == "embed" else len(own) - 1
    return Sides(own[:rows], own[rows:])


def by_path(tree: Any) -> dict[str, Any]:
    """The variables of a tree by their dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="."): variable for path, variable in leaves}


def is_matrix(optim: config.Optimiser, axes: tuple[str, ...]) -> bool:
    """Whether an optimiser orthogonalises the update of a parameter with these logical axes."""
    return isinstance(optim, config.Muon) and role(axes) in optim.matrices


def table(optim: config.Optimiser, params: Any) -> str:
    """What the optimiser does with each parameter, as lines of text, one for each."""
    lines = [_COLUMNS, *_rows(optim, by_path(params))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


_COLUMNS = ("parameter", "role", "rule", "shape", "matrices", "learning rate", "weight decay", "update scale")


def _rows(optim: config.Optimiser, params: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for path, variable in params.items():
        axes, shape = logical_axes(variable), variable.shape
        own, of_shape = role(axes), ", ".join(map(str, shape)) or "-"
        if own == "buffer":
            yield path, own, "-", of_shape, "-", "-", "-", "-"
            continue
        rule, matrices, scale = "AdamW", "-", "1"
        if isinstance(optim, config.Muon) and is_matrix(optim, axes):
            rows, columns = sides(axes, optim.heads).sizes(shape)
            rule, matrices = type(optim).__name__, f"{math.prod(shape) // (rows * columns)} x ({rows}, {columns})"
            scale = f"{update_scale(optim, rows, columns):.4g}"
            if isinstance(optim, config.NorMuon):
                scale = f"to rms {optim.rms:g}"
        rate, decay = factor(optim.learning_rates, axes), optim.weight_decay * factor(optim.decays, axes)
        yield path, own, rule, of_shape, matrices, f"x {rate:g}", f"{decay:g}", scale


def update_scale(optim: config.Muon, rows: int, columns: int) -> float:
    """What an orthogonal matrix is multiplied by, so that its root mean square is `optim.rms` (arXiv 2502.16982,
    §2.2): that of an orthogonal A × B matrix is 1 / √max(A, B)."""
    return optim.rms * math.sqrt(max(rows, columns))
