"""Muon and NorMuon: matrices are moved by their orthogonalised momentum, all else by AdamW."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from jmoe import config
from jmoe.optim.adam import keep_unless, scale_by_adam
from jmoe.optim.newton_schulz import coefficients, orthogonalise_each
from jmoe.optim.roles import Sides, by_path, is_matrix, sides, update_scale
from jmoe.optim.spread import Stack, each_matrix
from jmoe.sharding import is_variable, logical_axes

EPS = 1e-10
"""added to a root mean square before it divides: a matrix that never had a gradient stays zero"""


class MuonState(NamedTuple):
    """State by dotted path of the parameter: it is sharded as the parameters are."""

    momentum: Any
    """of `optax.trace`, for the matrices."""
    outputs: dict[str, Any]
    """NorMuon's running mean square of each output's update, float32; empty for Muon."""
    rest: Any
    """of `scale_by_adam`, for all else."""


def scale_by_muon(optim: config.Muon) -> optax.GradientTransformationExtraArgs:
    """The direction of Moonlight's Muon (arXiv 2502.16982, §2) for matrices: rms · √max(A, B) · O, where
    O = orthogonalise(G + μM) and M ← μM + G; that of AdamW for the rest. NorMuon divides each output's column of O by
    the root of its running mean square, and scales the matrix to `rms` again (arXiv 2510.05491, Algorithm 1).
    """
    momentum = optax.trace(optim.momentum, nesterov=True, accumulator_dtype=jnp.dtype(optim.momentum_dtype))
    adam = scale_by_adam(optim.b1, optim.b2, optim.eps)

    def split(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        matrices, rest = {}, {}
        for path, variable in by_path(tree).items():
            (matrices if is_matrix(optim, logical_axes(variable)) else rest)[path] = variable
        return matrices, rest

    def init(params: Any) -> MuonState:
        matrices, rest = split(params)
        normalised = matrices if isinstance(optim, config.NorMuon) else {}
        outputs = {path: _per_output(variable, optim) for path, variable in normalised.items()}
        return MuonState(momentum.init(matrices), outputs, adam.init(rest))

    def update(
        updates: Any, state: Any, params: Any = None, *, finite: ArrayLike = True, **_: Any
    ) -> tuple[Any, MuonState]:
        matrices, rest = split(updates)
        moved: Any  # optax's types know only dicts, lists and arrays
        moved, new_momentum = momentum.update(matrices, optax.tree.cast(state.momentum, jnp.float32))
        directions, outputs = orthogonalised(optim, moved), state.outputs
        if isinstance(optim, config.NorMuon):
            directions, outputs = normalised(optim, directions, outputs)
        moved, new_rest = adam.update(rest, state.rest, finite=finite)
        directions |= moved
        structure = jax.tree.structure(updates, is_leaf=is_variable)
        new = jax.tree.unflatten(structure, [directions[path] for path in by_path(updates)])
        new_momentum, outputs = keep_unless(finite, (state.momentum, state.outputs), (new_momentum, outputs))
        return new, MuonState(new_momentum, outputs, new_rest)

    return optax.GradientTransformationExtraArgs(init, update)


def sides_of(variable: nnx.Variable, optim: config.Muon) -> Sides:
    """Which dimensions of a parameter are rows and which columns."""
    return sides(logical_axes(variable), optim.heads)


def orthogonalised(optim: config.Muon, matrices: dict[str, Any]) -> dict[str, Any]:
    """rms · √max(A, B) · orthogonalise(X) for each A × B matrix X of the variables, float32, sharded as they are."""
    stacks = {path: Stack(logical_axes(v), sides_of(v, optim)) for path, v in matrices.items()}
    work = partial(orthogonalise_each, triples=coefficients(optim))
    # Rounded first, since it goes to other devices.
    rounded = {path: variable[...].astype(optim.iteration_dtype) for path, variable in matrices.items()}
    done = {}
    for path, x in each_matrix(work, rounded, stacks).items():
        rows, columns = stacks[path].sides.sizes(x.shape)
        done[path] = matrices[path].replace(update_scale(optim, rows, columns) * x.astype(jnp.float32))
    return done


def normalised(
    optim: config.NorMuon, directions: dict[str, Any], outputs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """NorMuon's directions from Muon's, and the new mean squares."""
    new_directions, new_outputs = {}, {}
    for path, variable in directions.items():
        (rows, columns), x, old = sides_of(variable, optim), variable[...], outputs[path][...]
        square = optim.output_decay * old + (1 - optim.output_decay) * jnp.mean(x * x, rows)
        x = x / (jnp.sqrt(jnp.expand_dims(square, rows)) + EPS)
        x = optim.rms * x / (jnp.sqrt(jnp.mean(x * x, (*rows, *columns), keepdims=True)) + EPS)
        new_directions[path], new_outputs[path] = variable.replace(x), outputs[path].replace(square)
    return new_directions, new_outputs


def _per_output(variable: nnx.Variable, optim: config.Muon) -> nnx.Variable:
    """Zeros, one for each column of each matrix of a parameter, sharded as it is; float32."""
    axes, rows = logical_axes(variable), sides_of(variable, optim).rows
    kept = [place for place in range(len(axes)) if place not in rows]
    zeros = jnp.zeros([variable.shape[place] for place in kept])
    return type(variable)(zeros, logical_axes=tuple(axes[place] for place in kept))
