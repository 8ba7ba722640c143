import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config, optim
from jmoe.model.layers import parameter

STEPS = 100


def rates(schedule):
    rate = optim.schedule(config.AdamW(learning_rate=2.0, schedule=schedule), STEPS)
    return np.array([float(rate(step)) for step in range(STEPS)])


def test_warm_up_rises_linearly_and_starts_above_zero():
    np.testing.assert_allclose(
        rates(config.Constant(warmup_steps=9))[:12], [*(2.0 * np.arange(1, 11) / 10), 2.0, 2.0], 1e-6
    )
    assert (rates(config.Constant(warmup_steps=0)) == 2.0).all()


def test_cosine_falls_to_its_final_share():
    got = rates(config.Cosine(warmup_steps=20, final=0.1))
    expected = [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (s - 20) / 80)) / 2) for s in range(20, STEPS)]
    np.testing.assert_allclose(got[20:], expected, rtol=1e-5)


@pytest.mark.parametrize("shape, tail", [("linear", lambda x: 1 - x), ("1-sqrt", lambda x: 1 - math.sqrt(x))])
def test_wsd_is_flat_and_then_decays(shape, tail):
    got = rates(config.WSD(warmup_steps=10, decay_fraction=0.2, shape=shape, final=0.05))
    np.testing.assert_allclose(got[10:80], 2.0)
    np.testing.assert_allclose(got[80:], [2.0 * (0.05 + 0.95 * tail(i / 20)) for i in range(20)], rtol=1e-5)


def test_warm_up_as_long_as_the_run_is_allowed():
    for schedule in (config.Cosine(STEPS), config.WSD(STEPS), config.Constant(STEPS)):
        assert np.isfinite(rates(schedule)).all()


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


def test_every_schedule_of_the_config_is_known():
    """A kind added to the config without its arithmetic fails here, not in a run."""
    for kind in config.Schedule.__args__:
        assert optim.schedule(dataclasses.replace(config.AdamW(), schedule=kind()), 200)(0) > 0
