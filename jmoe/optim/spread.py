"""Work on whole matrices, spread over the devices of a mesh that holds them in parts.

A device has a part of each matrix of a stack, cut along `embed`, say, and along `mlp`. By one all-to-all for each of
these cuts it gives parts of most matrices away and gets the other parts of a few, so that every matrix lies whole on
one device; there the work is done, and the results go back the same way. Devices that hold the same parts share the
matrices out among themselves before. So no device ever holds more than its share of a stack, none does another's work,
and what is sent each way is what a device holds of the parameters.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jmoe.optim.roles import Sides
from jmoe.sharding import spec, undivided

Work = Callable[[Float[Array, "M A B"]], Float[Array, "M A B"]]


class Stack(NamedTuple):
    """An array of matrices: its logical axes, and which of its dimensions are rows and which are columns."""

    axes: tuple[str, ...]
    sides: Sides


def each_matrix(work: Work, arrays: Mapping[str, Array], stacks: Mapping[str, Stack]) -> dict[str, Array]:
    """`work` done on all matrices of the arrays, which keep their shapes and shardings.

    Args:
      work: from matrices [M, A, B] to as many of the same shape, each by itself; a matrix of zeros is among them.
      arrays: by name, sharded by their logical axes.
      stacks: of each array.
    """
    if undivided():
        return {name: as_matrices(array, stacks[name].sides, work) for name, array in arrays.items()}
    specs = {name: spec(*stacks[name].axes) for name in arrays}
    # Unchecked, since an array gathered along an axis is not known to be the same along it.
    spread = jax.shard_map(partial(_spread, work, stacks), in_specs=(specs,), out_specs=specs, check_vma=False)
    return spread(dict(arrays))


def as_matrices(x: Array, sides: Sides, work: Work) -> Array:
    """`work` on an array as matrices [M, A, B]; its result back in the shape of the array."""
    rows, columns = sides
    batch = tuple(place for place in range(x.ndim) if place not in (*rows, *columns))
    order = (*batch, *rows, *columns)
    sizes = [math.prod(x.shape[place] for place in places) for places in (batch, rows, columns)]
    moved = x.transpose(order)
    return work(moved.reshape(sizes)).reshape(moved.shape).transpose([order.index(place) for place in range(x.ndim)])


class Cut(NamedTuple):
    """The mesh axes along which matrices are cut, and those along which devices hold the same."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    same: tuple[str, ...]

    def sizes(self) -> list[int]:
        shape = jax.sharding.get_abstract_mesh().shape
        return [math.prod(shape[axis] for axis in axes) for axes in self]


def cut(stack: Stack) -> Cut:
    """How the mesh in use cuts a stack."""
    shape = jax.sharding.get_abstract_mesh().shape
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec(*stack.axes)]
    by_dimension = [tuple(axis for axis in entry if axis and shape[axis] > 1) for entry in entries]
    taken = {axis for axes in by_dimension for axis in axes}
    # Of the dimensions that together are rows, or columns, only the first may be cut: what a device has is contiguous.
    assert not any(by_dimension[place] for places in stack.sides for place in places[1:]), stack
    rows, columns = (by_dimension[places[0]] for places in stack.sides)
    return Cut(rows, columns, tuple(axis for axis in shape if shape[axis] > 1 and axis not in taken))


def _spread(work: Work, stacks: Mapping[str, Stack], parts: dict[str, Array]) -> dict[str, Array]:
    """On a device: its parts of the arrays → its parts of the results. Few matrices of one shape and one cut go
    together with those of other arrays, so that more devices have work."""
    matrices, groups = {}, defaultdict(list)
    for name, part in parts.items():
        as_matrices(part, stacks[name].sides, lambda x, name=name: matrices.setdefault(name, x))
        (number, *shape), way = matrices[name].shape, cut(stacks[name])
        groups[way, *shape, name if number % math.prod(way.sizes()) == 0 else ""].append(name)
    done = {}
    for (way, *_), names in groups.items():
        stacked = jnp.concatenate([matrices[name] for name in names]) if len(names) > 1 else matrices[names[0]]
        result, start = _share(work, way, stacked), 0
        for name in names:
            own, start = result[start : start + len(matrices[name])], start + len(matrices[name])
            done[name] = as_matrices(parts[name], stacks[name].sides, lambda x, own=own: own)
    return done


def _share(work: Work, way: Cut, x: Float[Array, "M a b"]) -> Float[Array, "M a b"]:
    """On a device: its part of M matrices → its part of the M results."""
    number, (rows, columns, same) = len(x), way.sizes()
    # What a device takes part in: a multiple of the devices that have the other parts, filled up with zeros.
    share = -(-number // (rows * columns * same)) * rows * columns
    own = jnp.arange(share) + share * (lax.axis_index(way.same) if way.same else 0)
    if same > 1 or share > number:
        x = x.at[own].get(mode="fill", fill_value=0)
    cuts = [(axes, dimension) for dimension, axes in ((1, way.rows), (2, way.columns)) if axes]
    for axes, dimension in cuts:
        x = lax.all_to_all(x, axes, split_axis=0, concat_axis=dimension, tiled=True)
    x = work(x)
    for axes, dimension in reversed(cuts):
        x = lax.all_to_all(x, axes, split_axis=dimension, concat_axis=0, tiled=True)
    if same > 1 and share * same >= 2 * number:  # to gather would be to send zeros, for the most part
        zeros = jnp.zeros((number, *x.shape[1:]), x.dtype)
        return lax.psum(zeros.at[own].set(x, mode="drop"), way.same)
    return (lax.all_gather(x, way.same, tiled=True) if same > 1 else x)[:number]
