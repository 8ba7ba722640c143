import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config, optim
from jmoe.model.layers import parameter


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "gain": parameter(jnp.asarray(rng.normal(size=3), jnp.float32), "embed"),
        "stacked gain": parameter(jnp.asarray(rng.normal(size=(2, 3)), jnp.float32), "layers", "embed"),
        "matrix": parameter(jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "embed", "mlp"),
    }


def test_adamw_follows_its_equations(params):
    """Clipping, bias-corrected moments and decoupled decay (arXiv 1711.05101, algorithm 2), in NumPy."""
    settings = config.AdamW(b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1, clip_norm=0.5)
    transformation = optim.transformation(settings)
    state = transformation.init(params)
    m = v = jax.tree.map(lambda p: np.zeros(p.shape), params)
    for step in range(1, 4):
        grads = jax.tree.map(lambda p, s=step: jnp.sin(p * s), params)
        norm = math.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
        clipped = jax.tree.map(lambda g, n=norm: np.asarray(g) * min(1.0, 0.5 / n), grads)
        m = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, m, clipped)
        v = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, v, clipped)
        expected = jax.tree.map(lambda m, v, s=step: m / (1 - 0.8**s) / (np.sqrt(v / (1 - 0.9**s)) + 1e-6), m, v)
        updates, state = transformation.update(grads, state, params)
        for name in params:
            decay = 0.1 * np.asarray(params[name][...]) if name == "matrix" else 0.0
            np.testing.assert_allclose(updates[name][...], expected[name][...] + decay, rtol=1e-4, err_msg=name)
