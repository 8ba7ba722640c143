"""A layer's experts in buckets, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config
from jmoe.model.expert_parallel import apply_experts
from jmoe.model.experts import Experts
from jmoe.sharding import make_mesh, tree_shardings

MODEL = config.Model(d_model=8, init_std=0.5)
T, K = 32, 3


@pytest.mark.parametrize(
    "d_ff, shapes",
    [(16, [(4, 8, 16)]), ((8, 8, 16, 24), [(2, 8, 8), (1, 8, 16), (1, 8, 24)])],
    ids=["equal widths", "three widths"],
)
def test_a_bucket_holds_the_experts_of_one_width(d_ff, shapes):
    settings = config.MoE(num_experts=4, d_ff=d_ff, router=config.TopK(2))
    weights = Experts(settings, MODEL, jax.random.key(0)).weights()
    assert [bucket.gate.shape for bucket in weights] == shapes
    for gate, up, down in weights:
        assert up.shape == gate.shape == down.swapaxes(1, 2).shape
        assert 0.3 < float(jnp.std(gate)) < 0.7


def test_a_mesh_gives_what_one_device_gives(devices):
    settings = config.MoE(num_experts=4, d_ff=(8, 8, 16, 16), router=config.TopK(2))
    experts = Experts(settings, MODEL, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens, d_out = rng.normal(size=(2, T, 8)).astype(np.float32)
    expert_ids = jnp.asarray(rng.integers(0, 5, (T, K)).astype(np.int32))  # 4: no expert
    combine_weights = rng.random((T, K)).astype(np.float32)

    def run(experts, tokens, combine_weights, d_out):
        out, pullback = jax.vjp(
            lambda experts, t, w: apply_experts(t, expert_ids, w, experts.weights()),
            experts,
            tokens,
            combine_weights,
        )
        return out, pullback(d_out)

    want = jax.jit(run)(experts, tokens, combine_weights, d_out)
    mesh = make_mesh(config.Mesh(data=1, fsdp=2, expert=2, tensor=2), devices)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(jax.device_put(experts, tree_shardings(experts, mesh)), tokens, combine_weights, d_out)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
