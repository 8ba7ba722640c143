"""The device mesh, and the one table from logical axes to mesh axes.

Parameters are declared with logical axes (`jmoe.model.layers.parameter`), activations name theirs in `shard`; nothing
else in jmoe names a mesh axis but `jmoe.model.expert_parallel` and `jmoe.model.transport`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jmoe import config
from jmoe.config import InputError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

TABLE: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "seq": (),
    "embed": ("fsdp", "expert"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    # Experts of one width among others: too few to be shared out, so that each is split along `embed`.
    "bucket": (),
    "router": (),
    "expert_mlp": ("tensor",),
    "layers": (),
}


def make_mesh(sizes: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A mesh with the four axes of `MESH_AXES`, in Auto mode.

    Args:
      sizes: devices along each axis; one of them may be -1, for the devices left.
      devices: the devices to use; all if None. More devices than the sizes need is allowed, the first are taken.

    Raises:
      InputError: the sizes ask for more devices than there are, do not divide them, leave out a host, or do not run
        along the sides of the grid that TPUs stand in.
    """
    devices = jax.devices() if devices is None else devices
    shape = dataclasses.asdict(sizes)
    fixed = math.prod(size for size in shape.values() if size != -1)
    for name, size in shape.items():
        if size == -1:
            if len(devices) % fixed:
                raise InputError(
                    f"mesh.{name} = -1: {len(devices)} devices are not divisible by the other axes' {fixed}"
                )
            shape[name] = len(devices) // fixed
    needed = math.prod(shape.values())
    if needed > len(devices):
        raise InputError(f"mesh {shape} needs {needed} devices; there are {len(devices)}")
    hosts = [len({device.process_index for device in some}) for some in (devices[:needed], devices)]
    if hosts[0] < hosts[1]:
        raise InputError(
            f"mesh {shape} needs {needed} of {len(devices)} devices, and only {hosts[0]} of {hosts[1]} processes have "
            "those; start fewer, or let one axis be -1"
        )
    try:
        return jax.make_mesh(
            tuple(shape[axis] for axis in MESH_AXES),
            MESH_AXES,
            axis_types=(AxisType.Auto,) * len(MESH_AXES),
            devices=devices[:needed],
        )
    except NotImplementedError as error:  # TPUs stand in a grid, along whose sides the axes have to run
        raise InputError(f"mesh {shape}: {' '.join(str(error).split())}") from error


def spec(*logical_axes: str | None) -> PartitionSpec:
    """The partition of an array with these logical axes. A mesh axis serves only the first that asks for it, so that
    activations ("batch", "seq", "embed") keep `embed` whole where the batch has taken `fsdp`."""
    taken: set[str] = set()
    entries = []
    for logical in logical_axes:
        axes = tuple(axis for axis in (TABLE[logical] if logical else ()) if axis not in taken)
        taken.update(axes)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def undivided() -> bool:
    """Whether there is no mesh in use (`jax.set_mesh`), or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def shard(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Constrains `x` to the sharding of its logical axes on the mesh in use (`jax.set_mesh`), if there is one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def is_variable(node: Any) -> bool:
    """True for the Flax variables that hold a parameter and its logical axes; for `is_leaf` of tree functions."""
    return isinstance(node, nnx.Variable)


def logical_axes(variable: nnx.Variable) -> tuple[str, ...]:
    """The logical axes that a parameter (or optimiser state made like it) was declared with."""
    return variable.get_metadata("logical_axes")


def tree_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The shardings of a tree of arrays or shapes: parameters by their logical axes, everything else replicated.

    Returns a tree of the same structure with a `NamedSharding` for each array.
    """

    def of(node):
        if is_variable(node):
            return node.replace(NamedSharding(mesh, spec(*logical_axes(node))))
        return replicated(mesh)

    return jax.tree.map(of, tree, is_leaf=is_variable)


class Dimension(NamedTuple):
    """One dimension of a parameter, and how the mesh splits it."""

    size: int
    logical_axis: str
    mesh_axes: tuple[str, ...]
    """those with more than one device"""
    parts: int


def resolved(tree: Any, mesh: jax.sharding.Mesh) -> Iterator[tuple[str, list[Dimension], int]]:
    """Each variable of a tree, by its dotted path: its dimensions, and the bytes of one element."""
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable):
        if is_variable(node):
            dimensions = []
            for size, axis, entry in zip(node.shape, logical_axes(node), spec(*logical_axes(node)), strict=True):
                named = entry if isinstance(entry, tuple) else (entry,) if entry else ()
                axes = tuple(name for name in named if mesh.shape[name] > 1)
                dimensions.append(Dimension(size, axis, axes, math.prod(mesh.shape[a] for a in axes)))
            yield jax.tree_util.keystr(path, simple=True, separator="."), dimensions, node.dtype.itemsize


def sharding_table(tree: Any, mesh: jax.sharding.Mesh) -> str:
    """The resolved shardings of a tree's variables as lines of text, one for each: its path (layers are stacked over
    the repeats of their group), shape, logical axes, the mesh axes that split them, and the bytes that one device
    holds. A dimension that cannot be split evenly is marked with an exclamation mark."""
    rows, whole, share = [["parameter", "shape", "logical axes", "mesh axes", "bytes/device"]], 0, 0
    for path, dimensions, itemsize in resolved(tree, mesh):
        split = [
            "*".join(f"{axis} {mesh.shape[axis]}" for axis in d.mesh_axes) + (" !" if d.size % d.parts else "") or "-"
            for d in dimensions
        ]
        held = itemsize * math.prod(-(-d.size // d.parts) for d in dimensions)
        whole, share = whole + itemsize * math.prod(d.size for d in dimensions), share + held
        shape, axes = ([str(x) for x in column] for column in list(zip(*dimensions, strict=True))[:2] or ((), ()))
        rows.append([path, *(", ".join(cells) for cells in (shape, axes, split)), f"{held:,}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row[:-1], widths)) + f"  {row[-1]:>{widths[-1]}}" for row in rows]
    devices = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return "\n".join([*lines, f"mesh {devices}: {share:,} bytes on each device, of {whole:,}"])


def check_divisible(tree: Any, mesh: jax.sharding.Mesh) -> None:
    """Raises `InputError` if a parameter's dimension is not divisible by the devices it is to be split over."""
    for path, dimensions, _ in resolved(tree, mesh):
        for size, axis, axes, parts in dimensions:
            if size % parts:
                raise InputError(
                    f"{path}: its {axis} dimension of {size} is not divisible by mesh {'*'.join(axes)} = {parts}; "
                    "train.py --print-sharding shows how every parameter is split"
                )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of what every device holds whole, so that every host can read it."""
    return NamedSharding(mesh, PartitionSpec())


def host_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(host, hosts) for `jmoe.data.pipeline`: which share of each batch this process loads, and of how many.

    Processes between which only `tensor` runs need the same rows: they have one share. Raises `InputError` where the
    rows of two processes overlap in part.
    """
    rows: dict[int, set[int]] = {}
    parts = math.prod(mesh.shape[axis] for axis in TABLE["batch"])
    for device, (index,) in NamedSharding(mesh, spec("batch")).devices_indices_map((parts,)).items():
        rows.setdefault(device.process_index, set()).add(index.start or 0)
    shares = sorted({tuple(sorted(own)) for own in rows.values()})
    if sum(map(len, shares)) != parts:
        raise InputError(f"mesh {dict(mesh.shape)}: hosts share some of their rows; make tensor fit into a host")
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of a global batch, [B, S]."""
    return NamedSharding(mesh, spec("batch", "seq"))


def check_batch(batch_size: int, accumulation: int, mesh: jax.sharding.Mesh) -> None:
    """Raises `InputError` if a micro-batch cannot be split evenly over the devices along the batch."""
    parts = math.prod(mesh.shape[axis] for axis in TABLE["batch"])
    if batch_size % (accumulation * parts):
        raise InputError(
            f"batch_size = {batch_size} is not divisible by accumulation * mesh {'*'.join(TABLE['batch'])} = "
            f"{accumulation} * {parts}"
        )
