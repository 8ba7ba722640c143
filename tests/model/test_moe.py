"""The MoE layer against a loop over tokens and experts, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config
from jmoe.model.moe import MoE

MODEL = config.Model(d_model=16, init_std=0.5)
B, S = 2, 9


def dense_loop(layer, x, valid, settings):
    """Every expert on every token, weighed by the router's decision: the definition, at E/k times the cost."""
    E = settings.num_experts
    tokens = x.reshape(-1, x.shape[-1])
    routing = layer.router(tokens, valid.reshape(-1))
    weight = (routing.combine_weights[..., None] * jax.nn.one_hot(routing.expert_ids, E)).sum(1)  # [T, E]
    gate, up, down = (w[...].astype(x.dtype) for w in (layer.experts.gate, layer.experts.up, layer.experts.down))
    outputs = jnp.stack([(jax.nn.silu(tokens @ gate[e]) * (tokens @ up[e])) @ down[e] for e in range(E)], axis=1)
    return jnp.einsum("TED,TE->TD", outputs, weight.astype(x.dtype)).reshape(x.shape)


@pytest.mark.parametrize("router", [config.TopK(2), config.Nucleus(0.5), config.Nucleus(1.0)], ids=str)
def test_matches_the_dense_loop(router):
    settings = config.MoE(num_experts=5, d_ff=12, router=router)
    layer = MoE(settings, MODEL, jax.random.key(0))
    x, cotangent = jax.random.normal(jax.random.key(1), (2, B, S, 16))
    valid = jnp.arange(B * S).reshape(B, S) % 5 != 0

    def run(f):
        out, pullback = jax.vjp(f, layer, x)
        return out, *pullback(cotangent)

    got = run(lambda layer, x: layer(x, valid)[0])
    want = run(lambda layer, x: dense_loop(layer, x, valid, settings))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)
    assert float(jnp.abs(got[1].router.weight[...]).max()) > 1e-3  # the router learns through the combine weights
    assert not np.asarray(got[0])[~np.asarray(valid)].any()
