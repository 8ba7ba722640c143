"""A layer's experts compiled for four TPU chips with no TPU present: what they send is what must be sent."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jmoe import config, hlo
from jmoe.aot import topology_devices
from jmoe.model.expert_parallel import apply_experts
from jmoe.ops.routed_swiglu import ExpertWeights
from jmoe.sharding import make_mesh, spec

pytestmark = pytest.mark.aot

T, K, E, D, F = 4 * 2048, 4, 8, 1024, 512
ROWS = T // 4 * K * D * 2 * 3 / 4
"""bytes of a device's routed rows, less the quarter that stays where it is"""


def program(transport):
    mesh = make_mesh(config.Mesh(expert=4), topology_devices("v5p:2x2x1")[0])

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


def moved(transport):
    """Bytes that a device receives, by kind of collective, in round 0; and how many of each kind run."""
    work = hlo.work(program(transport).as_text())
    return work.moved, work.collectives


def test_each_row_is_sent_once_each_way():
    """Forward and backward; the routing that goes with the rows, and all else, within a tenth of it. No weights."""
    received, runs = moved(config.RaggedAllToAll())
    ragged, weight = received.pop("ragged-all-to-all"), E // 4 * D * F * 2
    assert runs["ragged-all-to-all"] == 4
    assert ragged == 4 * ROWS
    assert sum(received.values()) < min(0.1 * 4 * ROWS, weight)


def test_what_other_transports_send():
    """So the count above does tell: a gather takes a token to all devices, equal messages have room to spare."""
    exchanged, gathered = (sum(moved(of)[0].values()) for of in (config.AllToAll(), config.AllGather()))
    assert 1.25 <= exchanged / (4 * ROWS) < 1.3
    assert gathered >= 2 * (T - T // 4) * D * 2
