"""The device mesh, and the one table from logical axes to mesh axes.

Parameters are declared with logical axes (`jmoe.model.layers.parameter`), activations name theirs in `shard`; nothing
else in jmoe names a mesh axis but `jmoe.model.expert_parallel`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jmoe import config
from jmoe.config import InputError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

TABLE: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "seq": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
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
      InputError: the sizes ask for more devices than there are, or do not divide them.
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
    return jax.make_mesh(
        tuple(shape[axis] for axis in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[:needed],
    )


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
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of, tree, is_leaf=is_variable)


def check_divisible(tree: Any, mesh: jax.sharding.Mesh) -> None:
    """Raises `InputError` if a parameter's dimension is not divisible by the devices it is to be split over."""

    def check(path, node):
        if not is_variable(node):
            return
        for size, axis, entry in zip(node.shape, logical_axes(node), spec(*logical_axes(node)), strict=True):
            axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            parts = math.prod(mesh.shape[a] for a in axes)
            if size % parts:
                place = jax.tree_util.keystr(path, simple=True, separator=".")
                raise InputError(
                    f"{place}: its {axis} dimension of {size} is not divisible by mesh {'*'.join(axes)} = {parts}"
                )

    jax.tree_util.tree_map_with_path(check, tree, is_leaf=is_variable)


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
