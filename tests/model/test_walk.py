"""The forward pass layer by layer is the forward pass."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import config
from jmoe.batch import Batch
from jmoe.model.attention import Place
from jmoe.model.transformer import Transformer
from jmoe.model.walk import walk

LAYERS = (config.LayerGroup((config.Dense(24), config.MoE(4, 8, config.TopK(2), shared_d_ff=8)), repeats=2),)
MODEL = config.Model(vocab_size=64, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, init_std=0.3, layers=LAYERS)


def test_it_ends_where_the_model_ends():
    params = Transformer(MODEL, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9), np.int32)
    segments = np.where(np.arange(9) < 5, 1, np.where(np.arange(9) < 8, 2, 0)).astype(np.int32)[None].repeat(2, 0)
    positions = np.where(np.arange(9) < 5, np.arange(9), np.arange(9) - 5).astype(np.int32)[None].repeat(2, 0)
    batch = Batch(tokens, tokens, segments, positions, segments > 0)
    visits = list(walk(params, MODEL, batch))
    assert [(visit.number, visit.settings) for visit in visits] == list(enumerate(2 * LAYERS[0].pattern))
    place = Place(*(jnp.asarray(x) for x in (segments, positions, segments, positions)))
    hidden, _, _ = params(jnp.asarray(tokens), place)
    np.testing.assert_allclose(params.final_norm(visits[-1].residual), hidden, rtol=1e-5, atol=1e-5)
    for before, visit in pairwise(visits):  # what attention and feed-forward add is all there is
        assert not np.allclose(visit.residual, before.residual + visit.outputs, atol=1e-3)
