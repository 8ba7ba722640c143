"""A layer's experts in buckets."""

import jax
import jax.numpy as jnp
import pytest

from jmoe import config
from jmoe.model.experts import Experts

MODEL = config.Model(d_model=8, init_std=0.5)


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
