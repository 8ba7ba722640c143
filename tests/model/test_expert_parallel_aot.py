"""A layer's experts compiled for four TPU chips with no TPU present: what they send is what must be sent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from jmoe import config
from jmoe.model.expert_parallel import apply_experts
from jmoe.ops.routed_swiglu import ExpertWeights
from jmoe.sharding import make_mesh, spec

pytestmark = pytest.mark.aot

T, K, E, D, F = 4 * 2048, 4, 8, 1024, 512
SIZES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}


def program(transport):
    mesh = make_mesh(config.Mesh(expert=4), topologies.get_topology_desc("v5p:2x2x1", "tpu").devices)

    def shape(dtype, *sizes_and_axes):
        sizes, axes = zip(*sizes_and_axes, strict=True)
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec(*axes)))

    wide, high = (("expert", "embed", "expert_mlp"), (E, D, F)), (("expert", "expert_mlp", "embed"), (E, F, D))
    weights = ExpertWeights(*(shape(jnp.float32, *zip(sizes, axes, strict=True)) for axes, sizes in (wide, wide, high)))
    tokens, ids, slots = (
        shape(dtype, (T, "batch"), (n, None)) for dtype, n in ((jnp.bfloat16, D), (jnp.int32, K), (jnp.float32, K))
    )

    def value_and_gradients(tokens, ids, slots, weights, d_out):
        f = lambda x, w, experts: apply_experts(x, ids, w, (experts,), transport)[0]  # noqa: E731
        out, pullback = jax.vjp(f, tokens, slots, weights)
        return out, pullback(d_out)

    with jax.set_mesh(mesh):
        traced = jax.jit(value_and_gradients).trace(tokens, ids, slots, weights, tokens)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def bytes_of(shape):
    return max(
        SIZES[dtype] * int(np.prod([int(n) for n in sizes.split(",") if n]))
        for dtype, sizes in re.findall(r"(bf16|f32|s32|u32|pred)\[([\d,]*)\]", shape)
    )


def collectives(text):
    """Kind, bytes of result and of first operand of each collective of round 0. The result of a ragged all-to-all is a
    buffer: what is sent is no more than the smaller of the two."""
    shapes = dict(re.findall(r"%([\w.-]+) = (\(?[^=]*?\)?) [\w-]+\(", text))
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all"
    for line in text.splitlines():
        found = re.search(rf"= (\(?[^=]*?\)?) ({kinds})(?:-start)?\((?:[^%)]*)%([\w.-]+)", line)
        if found and "further_rounds" not in line:
            result, kind, operand = found.groups()
            yield kind, bytes_of(result), bytes_of(shapes[operand])


def test_each_row_is_sent_once_each_way():
    """Forward and backward; the routing that goes with the rows, and all else, within a tenth of it."""
    compiled = program(config.RaggedAllToAll())
    found = list(collectives(compiled.as_text()))
    rows = T // 4 * K * D * 2
    ragged = [min(result, operand) for kind, result, operand in found if kind == "ragged-all-to-all"]
    assert ragged == [rows] * 4
    assert sum(ragged) + sum(result for kind, result, _ in found if kind != "ragged-all-to-all") < 1.1 * 4 * rows
    assert not [1 for kind, result, _ in found if result >= E // 4 * D * F * 2 and kind != "ragged-all-to-all"]


def test_what_other_transports_send():
    """So the count above does tell: a gather takes a token to all devices, equal messages have room to spare."""
    rows = T // 4 * K * D * 2
    exchanged = sum(result for kind, result, _ in collectives(program(config.AllToAll()).as_text()))
    assert 1.25 <= exchanged / (4 * rows) < 1.3
    gathered = sum(result for _, result, _ in collectives(program(config.AllGather()).as_text()))
    assert gathered >= 2 * T * D * 2
