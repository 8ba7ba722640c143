from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmoe import config, optim
from jmoe.model.layers import parameter
from jmoe.optim.adam import clip, keep_unless


def matrices(scale) -> Any:
    normal = np.random.default_rng(0).normal(size=(2, 256, 512)) * scale
    return {name: parameter(jnp.asarray(x, jnp.float32), "embed", "mlp") for name, x in zip("ab", normal, strict=True)}


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_is_optax_s(max_norm):
    gradients = matrices(1.0)
    for each in (gradients, jax.tree.map(jnp.zeros_like, gradients)):
        got, want = (f.update(each, f.init(each))[0] for f in (clip(max_norm), optax.clip_by_global_norm(max_norm)))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, want)


@pytest.mark.parametrize("settings", [config.AdamW(), config.Muon(), config.NorMuon()], ids=lambda s: type(s).__name__)
def test_state_stays_where_gradients_are_not_finite(settings):
    transformation, params = optim.transformation(settings), matrices(0.02)
    gradients = {"a": params["a"], "b": params["b"].replace(params["b"][...].at[0, 0].set(jnp.nan))}
    update = jax.jit(transformation.update)
    _, state = update(params, transformation.init(params), params, finite=jnp.asarray(True))
    _, after = update(gradients, state, params, finite=jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert any(jnp.any(x != 0) for x in jax.tree.leaves(state))


def test_an_update_is_made_in_place():
    """On CPU, with what is donated: no copy of gradients or moments is stored on the way."""
    transformation, params = optim.transformation(config.AdamW()), matrices(0.02)

    def step(params, state, gradients):
        finite = jnp.isfinite(optax.tree.norm(gradients))
        direction, state = transformation.update(gradients, state, params, finite=finite)
        return keep_unless(finite, params, optax.apply_updates(params, optax.tree.scale(-1e-3, direction))), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, transformation.init(params), params).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < params["a"].nbytes / 8
