"""Muon's update compiled for TPU chips with no TPU present: how its work is shared out, and what it sends."""

import jax
import pytest

from jmoe import config, hlo, optim, sharding, training
from jmoe.aot import topology_devices
from jmoe.optim.roles import by_path

pytestmark = pytest.mark.aot

D, F, E, LAYERS = 256, 128, 8, 4
MODEL = config.Model(
    d_model=D,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    layers=(config.LayerGroup((config.MoE(E, F, config.TopK(2)),), repeats=LAYERS),),
)
MUON = config.Muon()


def test_chips_share_the_work_and_none_has_a_whole_stack():
    settings = config.Config(model=MODEL, optim=MUON, mesh=config.Mesh(fsdp=2, expert=2))
    mesh = sharding.make_mesh(settings.mesh, topology_devices("v5e:2x2")[0])
    state = training.abstract_state(settings, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, (state.params, state.opt_state))
    update = jax.jit(optim.transformation(MUON).update, out_shardings=shardings)
    with jax.set_mesh(mesh):
        traced = update.trace(state.params, state.opt_state, state.params)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    computations, _ = hlo.parse(text)
    stack = by_path(state.params)["layers.0.0.feed_forward.experts.buckets.0.gate"]
    for of in computations.values():
        for instruction in of.values():
            elements = [shape.bytes / (2 if shape.dtype == "bf16" else 4) for shape in instruction.shapes]
            assert max(elements, default=0) < stack.size, instruction
    work = hlo.work(text)
    experts = 3 * LAYERS * E * 5 * (2 * F * F * D * 2 + 2 * F**3)
    rest = LAYERS * 5 * (4 * 3 * 2 * D**3 + 2 * E * E * D * 2 + 2 * E**3)
    assert work.products == pytest.approx((experts + rest) / 4, rel=0.02)
    # To whole matrices and back, in bfloat16, half or three quarters of what a device holds.
    assert "all-gather" not in work.moved
    held = 2 * (3 * LAYERS * E * D * F + 4 * LAYERS * D * D) / 4
    assert 0 < work.moved["all-to-all"] < 2 * held
