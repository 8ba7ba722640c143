"""Layers one by one and back into groups."""

import numpy as np
import pytest

from jmoe import config
from jmoe.config import Dense, LayerGroup, MoE
from jmoe.convert.layers import by_layer, group_layers, write_layers
from jmoe.convert.mapping import parameter_shapes
from jmoe.flops import feed_forwards, places

A, B, C = Dense(8), Dense(16), MoE(4, 8)


def model(*layers):
    return config.Model(vocab_size=32, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, layers=layers)


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ([A], [LayerGroup((A,))]),
        ([A, A, A], [LayerGroup((A,), 3)]),
        ([A, C, A, C], [LayerGroup((A, C), 2)]),
        ([A, C, C, C], [LayerGroup((A,)), LayerGroup((C,), 3)]),
        ([A, B, C, A, B, C, B], [LayerGroup((A, B, C), 2), LayerGroup((B,))]),
        ([A, A, B, A, A, B], [LayerGroup((A, A, B), 2)]),
    ],
)
def test_groups_unroll_the_fewest_layers(layers, groups):
    found = group_layers(layers)
    assert list(found) == groups
    assert feed_forwards(model(*found)) == layers


def test_regrouped_parameters_stay_with_their_layers():
    old = model(LayerGroup((A, C), 2), LayerGroup((A,), 2))
    new = model(LayerGroup((A,)), LayerGroup((C, A)), LayerGroup((C,)), LayerGroup((A,), 2))
    draw = np.random.default_rng(0)
    stored = {name: draw.normal(size=shape).astype(np.float32) for name, shape in parameter_shapes(old).items()}

    def read(name, index):
        return stored[name][index]

    written = {name: np.full(shape, np.nan, np.float32) for name, shape in parameter_shapes(new).items()}
    write_layers(new, read, by_layer(old, read), lambda name, index, part: written[name].__setitem__(index, part))
    assert feed_forwards(old) == feed_forwards(new)
    assert places(new) == [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (3, 0, 0), (3, 0, 1)]
    of_old, of_new = by_layer(old, read), by_layer(new, lambda name, index: written[name][index])
    for layer, kind in enumerate(feed_forwards(old)):
        names = ["attention/query", "feed_forward_norm/gain"]
        names += ["feed_forward/up"] if kind == A else ["feed_forward/router/weight"]
        for name in names:
            np.testing.assert_array_equal(of_new(layer, name), of_old(layer, name))
    np.testing.assert_array_equal(written["embedding"], stored["embedding"])
    assert not any(np.isnan(array).any() for array in written.values())
