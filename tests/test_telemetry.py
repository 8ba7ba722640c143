"""What is told of a model and its routers, against values counted by hand."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from jmoe import config
from jmoe.flops import training_flops
from jmoe.metrics import plain
from jmoe.model.router import RouterStats
from jmoe.model.transformer import RouterState
from jmoe.telemetry import describe_model, describe_routing

TOKENS = 10.0
D = 8


def stats_of(tokens_per_expert, tokens_per_count, entropy=0.0, dropped=0.0):
    """Statistics of a layer that is repeated once."""
    zero = np.zeros((1, len(tokens_per_expert)))
    values = (tokens_per_expert, zero[0], tokens_per_count, entropy, 0.0, 0.0, dropped)
    return RouterStats(*(np.array(value, np.float32)[None] for value in values))


def model_of(*layers):
    return config.Model(d_model=D, vocab_size=20, num_heads=2, num_kv_heads=1, head_dim=4, layers=layers)


WIDE = config.MoE(4, (2, 4, 6, 8), config.TopK(2, bias_rate=1e-3), identity_experts=1, shared_d_ff=5)
PLAIN = config.MoE(4, 3, config.Nucleus(0.5, max_slots=2, experts_per_token=1.2))
MODEL = model_of(config.LayerGroup((config.Dense(7), WIDE)), config.LayerGroup((PLAIN,)))
STATS = (
    (None, stats_of([3, 1, 0, 6, 10], [0, 10, 0], entropy=12.5)),
    (stats_of([5, 7, 0, 1], [0, 7, 3], entropy=5.0, dropped=4.0),),
)
ROUTERS = (
    (None, RouterState(np.array([[0.25, -0.25, 0.0, 0.0, 0.0]], np.float32), None)),
    (RouterState(None, np.array([0.375], np.float32)),),
)


def test_each_value_is_what_a_hand_counts():
    told = plain(describe_routing(MODEL, 16, STATS, TOKENS, ROUTERS))
    widths = [0.3 * 2 + 0.1 * 4 + 0.6 * 8, 1.3 * 3]
    experts_in_all = 3 * D * (20 + 4 * 3)
    attention, norms = 2 * D * 8 + 2 * D * 4 + 2 * 4, 2 * D
    parameters = 20 * D + 3 * (attention + norms) + D + D * (5 + 4) + 3 * D * (7 + 5) + experts_in_all
    layers = {
        "experts_per_token": [1.0, 1.3],
        "experts_per_token_histogram": [[0.0, 1.0, 0.0], [0.0, 0.7, 0.3]],
        "identity_per_token": [1.0, None],
        "dropped_per_token": [0.0, 0.4],
        "activated_expert_parameters": [3 * D * (widths[0] + 5), 3 * D * widths[1]],
        "load": [[0.15, 0.05, 0.0, 0.3, 0.5], [0.384615, 0.538462, 0.0, 0.076923]],
        "load_cv": [np.std([0.75, 0.25, 0.0, 1.5, 2.5]), np.std([20 / 13, 28 / 13, 0, 4 / 13])],
        "load_max_over_mean": [2.5, 28 / 13],
        "dead_experts": [1, 1],
        "router_entropy": [1.25, 0.5],
        "router_bias_range": [0.5, None],
        "nucleus_p": [None, 0.375],
    }
    expected = {
        "experts_per_token": 1.15,
        "dropped_per_token": 0.2,
        "parameters": parameters,
        "activated_parameters": parameters - experts_in_all + 3 * D * sum(widths),
        "flops_per_token": training_flops(MODEL, 16),
        "activated_flops_per_token": training_flops(MODEL, 16, widths),
        "moe_layers": [1, 2],
    } | {f"{name}_by_layer": values for name, values in layers.items()}
    assert jax.tree.structure(told) == jax.tree.structure(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(jax.tree.leaves(told[name]), jax.tree.leaves(value), rtol=2e-6, err_msg=name)


def test_when_all_go_to_all_everything_is_activated():
    model = model_of(config.LayerGroup((config.MoE(4, (2, 4, 6, 8), config.TopK(4), shared_d_ff=5),), repeats=2))
    stats = jax.tree.map(lambda x: np.concatenate([x, x]), stats_of([TOKENS] * 4, [0, 0, 0, 0, TOKENS]))
    told = describe_routing(model, 16, ((stats,),), TOKENS, ((RouterState(None, None),),))
    assert told["activated_parameters"] == told["parameters"]
    assert told["activated_flops_per_token"] == told["flops_per_token"]
    assert told["activated_expert_parameters_by_layer"] == [3 * D * 25] * 2
    assert told["load_cv_by_layer"] == [0, 0] and told["load_max_over_mean_by_layer"] == [1, 1]
    absent = ("identity_per_token_by_layer", "router_bias_range_by_layer", "nucleus_p_by_layer")
    assert not set(absent) & set(told)


def test_a_dense_model_has_no_routing():
    model = model_of(config.LayerGroup((config.Dense(7),), repeats=2))
    assert describe_routing(model, 16, ((None,),), TOKENS, ((None,),)) == {}


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_no_token_and_no_number_are_told_too(value):
    """Warnings are errors here: there is no division by 0."""
    stats = jax.tree.map(lambda x: np.full_like(x, value), STATS)
    told = plain(describe_routing(MODEL, 16, stats, TOKENS, ROUTERS))
    json.dumps(told, allow_nan=False)
    if not value:
        assert told["load_max_over_mean_by_layer"] == [0, 0] and told["dead_experts_by_layer"] == [5, 4]


def test_a_line_of_a_large_model_is_of_bearable_size():
    """58 layers of 256 experts: what each expert's load takes, and little else."""
    model = model_of(config.LayerGroup((config.MoE(256, 4, config.TopK(8)),), repeats=58))
    counts = np.random.default_rng(0).multinomial(8 * 4096, np.full(256, 1 / 256), 58).astype(np.float32)
    each = partial(np.ones, dtype=np.float32)
    stats = RouterStats(counts, counts, each((58, 9)), each(58), each(58), each(58), each(58))
    told = describe_routing(model, 4096, ((stats,),), 4096.0, ((RouterState(None, None),),))
    assert len(json.dumps(plain(told))) < 58 * (256 * 10 + 200)


def test_the_line_on_a_model_counts_its_parameters():
    model = model_of(config.LayerGroup((WIDE,), repeats=2))  # its routers have state besides
    layer = 2 * D + 2 * D * 8 + 2 * D * 4 + 2 * 4 + D * 5 + 3 * D * (20 + 5)
    total = 20 * D + D + 2 * layer
    assert describe_model(model) == f"model: 2 layers, {total:,} parameters, {2 * 3 * D * 20} of them in experts"
