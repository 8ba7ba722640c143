"""FLOPs per token: those that XLA counts, and those of a hand's count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config
from jmoe.flops import forward_flops, training_flops
from jmoe.model.attention import Place, positions_in_row
from jmoe.model.transformer import Transformer

B, S = 2, 64


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_a_dense_model_has_the_flops_that_xla_counts(heads):
    """XLA also counts what is no matrix product: norms, softmax, activations. At this width they are a few percent."""
    model = config.Model(
        vocab_size=512,
        d_model=256,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=96,
        layers=(config.LayerGroup((config.Dense(640), config.Dense(320))),),
    )

    def logits(params, tokens):
        segments, positions = jnp.ones((B, S), jnp.int32), positions_in_row(B, S)
        return params.logits(params(tokens, Place(segments, positions, segments, positions))[0])

    shapes = jax.eval_shape(lambda: Transformer(model, jax.random.key(0))), jax.ShapeDtypeStruct((B, S), jnp.int32)
    counted = jax.jit(logits).lower(*shapes).compile().cost_analysis()["flops"] / (B * S)
    assert 1.0 < counted / forward_flops(model, S) < 1.04


def test_of_a_sparse_model_what_is_activated_counts():
    """The MoE layers differ from dense ones by their routers and shared gates alone."""

    def model(*layers):
        return config.Model(d_model=32, layers=(config.LayerGroup((config.Dense(48),)), config.LayerGroup(layers, 2)))

    few = config.MoE(8, 16, config.TopK(2), widths="arithmetic", identity_experts=1, shared_d_ff=24, shared_gate=True)
    sparse, routers = model(few, config.MoE(4, 10)), 2 * 2 * 32 * (9 + 1 + 4)
    dense = forward_flops(model(config.Dense(20 + 24), config.Dense(12)), 100)
    np.testing.assert_allclose(forward_flops(sparse, 100, [18.5, 11.0, 21.5, 13.0]), dense + routers, rtol=1e-12)
    everything = forward_flops(model(config.Dense(8 * 16 + 24), config.Dense(40)), 100)
    assert forward_flops(sparse, 100) == everything + routers
    assert training_flops(sparse, 100) == 3 * forward_flops(sparse, 100)


def test_attention_looks_at_the_whole_sequence():
    model = config.Model(layers=(config.LayerGroup((config.Dense(),), repeats=3),))
    more = forward_flops(model, 300) - forward_flops(model, 200)
    assert more == 3 * 2 * 2 * 100 * model.num_heads * model.head_dim
