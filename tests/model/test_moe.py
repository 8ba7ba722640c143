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
    tokens = x.reshape(-1, x.shape[-1])
    routing = layer.router(x, valid)
    weight = (routing.combine_weights[..., None] * jax.nn.one_hot(routing.expert_ids, settings.num_experts)).sum(1)
    banks = layer.experts.weights()
    experts = [expert for bank in banks for expert in zip(*bank, strict=True)]
    assert [gate.shape[1] for gate, _, _ in experts] == list(settings.expert_widths)

    def swiglu(gate, up, down):
        return (jax.nn.silu(tokens @ gate) * (tokens @ up)) @ down

    out = sum(weight[:, e, None] * swiglu(*expert) for e, expert in enumerate(experts))
    out += routing.identity_weights[:, None] * tokens
    if layer.shared is not None:
        shared = swiglu(*(w[...] for w in (layer.shared.swiglu.gate, layer.shared.swiglu.up, layer.shared.swiglu.down)))
        out += shared if layer.shared.weight is None else jax.nn.sigmoid(tokens @ layer.shared.weight[...]) * shared
    return out.reshape(x.shape)


LAYERS = {
    "top-k": config.MoE(5, 12, config.TopK(2)),
    "nucleus": config.MoE(5, 12, config.Nucleus(0.5)),
    "nucleus of all": config.MoE(5, 12, config.Nucleus(1.0)),
    "hybrid widths, nucleus": config.MoE(8, 8, config.Nucleus(0.4), widths="hybrid"),
    "listed widths, top-k, shared": config.MoE(4, (3, 3, 8, 20), config.TopK(2), shared_d_ff=6),
    "identity, sigmoid, bias, shared with a gate": config.MoE(
        5, 12, config.TopK(3, "sigmoid", scale=2.0, bias_rate=0.1), identity_experts=3, shared_d_ff=6, shared_gate=True
    ),
    "identity, nucleus with few slots": config.MoE(5, 12, config.Nucleus(0.7, max_slots=2), identity_experts=2),
}


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS.keys())
def test_matches_the_dense_loop(settings):
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
    if layer.shared is None:
        assert not np.asarray(got[0])[~np.asarray(valid)].any()
    if layer.router.bias is not None:
        assert not np.asarray(got[1].router.bias[...]).any()
