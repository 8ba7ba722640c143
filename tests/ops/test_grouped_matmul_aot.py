"""grouped_matmul compiled for TPU topologies, with no TPU present: the kernels fit, and are what does the work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jmoe.aot import topology_devices
from jmoe.ops import grouped_matmul as module
from jmoe.ops.grouped_matmul import grouped_matmul, ragged_dot

pytestmark = pytest.mark.aot

ROWS, E, D, F = 16384, 8, 2048, 1536
USEFUL_FLOPS = 3 * 2 * ROWS * D * F
"""Of the product and both its gradients."""


def value_and_gradients(rows, weights, group_sizes):
    def loss(rows, weights):
        return (grouped_matmul(rows, weights, group_sizes).astype(jnp.float32) ** 2).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(rows, weights)


def compiled(function, mesh, *arguments):
    """For the mesh; arguments are (shape, dtype, partition spec)."""
    shapes = [jax.ShapeDtypeStruct(axes, dtype, sharding=NamedSharding(mesh, spec)) for axes, dtype, spec in arguments]
    # In a lambda of its own: jit keeps what it has traced of a function, whatever is patched since.
    return jax.jit(lambda *arguments: function(*arguments)).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()


def kernels(program):
    """Names of the program's kernels, in order. Megablox's are gmm and tgmm; XLA's own, ragged-dot and more."""
    return sorted(re.findall(r'%([\w-]+?)[.\d]* = .*custom_call_target="tpu_custom_call"', program.as_text()))


def chips(topology, count):
    devices = topology_devices(topology)[0][:count]
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def arguments(dtype, copies=1):
    """On each of `copies` chips its own rows and group sizes, and the whole of the weights."""
    split, whole = PartitionSpec("data"), PartitionSpec()
    return (
        ((copies * ROWS, D), dtype, split),
        ((E, D, F), dtype, whole),
        ((copies * E,), jnp.int32, split),
    )


@pytest.mark.parametrize(
    ("topology", "dtype"),
    [("v5e:2x2", "bfloat16"), ("v5e:2x2", "float32"), ("v5p:2x2x1", "bfloat16"), ("v6e:2x2", "bfloat16")],
)
def test_the_work_is_three_kernels(topology, dtype):
    """Forward, d_rows, d_weights; a kernel that asks for more VMEM than the chip has would not compile."""
    program = compiled(value_and_gradients, chips(topology, 1), *arguments(dtype))
    assert kernels(program) == ["gmm", "gmm", "tgmm"]
    # A kernel's cost is what it says itself: all rows, once. The rest are masks and the loss.
    assert USEFUL_FLOPS <= program.cost_analysis()["flops"] < 1.05 * USEFUL_FLOPS


def test_ragged_dot_would_do_more(monkeypatch):
    """So the count above does tell: its gradient of the weights multiplies all rows for every group."""
    monkeypatch.setattr(module, "IMPLEMENTATIONS", {"default": ragged_dot})
    program = compiled(value_and_gradients, chips("v5e:2x2", 1), *arguments("bfloat16"))
    assert program.cost_analysis()["flops"] > (2 + E) / 3 * 0.95 * USEFUL_FLOPS


def test_four_chips_with_rows_of_their_own():
    split, whole = PartitionSpec("data"), PartitionSpec()

    def on_device(rows, weights, group_sizes):
        loss, (d_rows, d_weights) = value_and_gradients(rows, weights, group_sizes)
        return jax.lax.psum(loss, "data"), d_rows, jax.lax.psum(d_weights, "data")

    mesh = chips("v5e:2x2", 4)
    function = jax.shard_map(
        on_device, mesh=mesh, in_specs=(split, whole, split), out_specs=(whole, split, whole), check_vma=False
    )
    program = compiled(function, mesh, *arguments("bfloat16", copies=4))
    assert kernels(program) == ["gmm", "gmm", "tgmm"]
    assert "all-reduce" in program.as_text() and "all-gather" not in program.as_text()
    assert program.cost_analysis()["flops"] < 1.05 * USEFUL_FLOPS  # per chip


def test_buckets_of_any_width():
    """Rows and widths that no tile divides, and a bucket in the middle."""
    whole = PartitionSpec()

    def function(rows, up, down, group_sizes):
        def loss(rows, up, down):
            hidden = grouped_matmul(rows, up, group_sizes, 1)
            return grouped_matmul(hidden, down, group_sizes, 1).astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(rows, up, down)

    mesh = chips("v5e:2x2", 1)
    for width in (37, 1100):
        shapes = ((100, 200), jnp.bfloat16, whole), ((2, 200, width), jnp.bfloat16, whole)
        program = compiled(function, mesh, *shapes, ((2, width, 200), jnp.bfloat16, whole), ((4,), jnp.int32, whole))
        assert kernels(program) == ["gmm"] * 3 + ["tgmm"] * 2  # the value of the last product is not needed
