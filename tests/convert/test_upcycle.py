"""Upcycling: what keeps the dense model's function keeps it, and the report says what does not."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import config, recipe, sharding, training
from jmoe.batch import Batch
from jmoe.checkpoint import Checkpoints, flatten, unflatten
from jmoe.config import Dense, InputError, LayerGroup, MoE, Nucleus, TopK
from jmoe.convert import upcycle
from jmoe.convert.held_out import difference
from jmoe.convert.layers import write_layers
from jmoe.convert.mapping import parameter_shapes
from jmoe.convert.mixture import Options, scale
from jmoe.convert.upcycle import Plan, parse_layers
from jmoe.data import tokenizer
from jmoe.flops import feed_forwards
from jmoe.model.transformer import Transformer
from jmoe.run_directory import RunDirectory

SHAPE = config.Model(257, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, init_std=0.3)
DENSE = dataclasses.replace(SHAPE, layers=(LayerGroup((Dense(24),), 3),))


def parameters(model, seed=0):
    return {name: np.asarray(leaf) for name, leaf in flatten(Transformer(model, jax.random.key(seed))).items()}


def reader(model, seed=0):
    stored = parameters(model, seed)
    return lambda name, index: stored[name][index]


def batch():
    tokens = np.random.default_rng(0).integers(0, 257, (2, 12), np.int32)
    ones = np.ones_like(tokens)
    return Batch(tokens, tokens, ones, np.arange(12, dtype=np.int32)[None].repeat(2, 0), ones > 0)


def upcycled(options, given=None, dense=DENSE):
    """The plan, and its model's parameters."""
    plan = Plan(dense, reader(dense), options, given)
    made = {name: np.full(shape, np.nan, np.float32) for name, shape in parameter_shapes(plan.model).items()}
    write_layers(plan.model, reader(dense), plan.of_layer, lambda name, i, part: made[name].__setitem__(i, part))
    assert not any(np.isnan(array).any() for array in made.values())
    return plan, made


def differs(plan, made, dense=DENSE):
    abstract = jax.eval_shape(lambda key: Transformer(plan.model, key), jax.random.key(0))
    old = Transformer(dense, jax.random.key(0))
    return difference(
        old, unflatten({name: jnp.asarray(array) for name, array in made.items()}, abstract), dense, plan.model, batch()
    )


SIGMOID = MoE(8, 4, TopK(4, score="sigmoid", scale=2.5, bias_rate=1e-3))
KEEP = {
    "copies": dict(experts=4, router_std=1.0),
    "copies beside a shared expert": dict(experts=4, granularity=3, shared=2, top_k=3),
    "a virtual group of shards": dict(method="split", experts=2, granularity=4, router_std=1.0),
    "two groups, a shared expert, one layer": dict(
        method="split", experts=3, granularity=4, shared=1, top_k=6, layers="1"
    ),
    "nothing drawn anew": dict(method="drop", experts=2, drop=0.0),
    "routers of another run": dict(method="split", experts=2, granularity=4, router="from:RUN"),
}
CHANGE = {
    "drop": (dict(method="drop", experts=2, drop=0.5), "50% of each expert's hidden units are drawn anew"),
    "half a group": (dict(method="split", experts=2, granularity=4, top_k=2), "top-k = 2 is no multiple of the 4"),
    "a nucleus": (dict(experts=8, nucleus=0.4), "nucleus sum to less than 1"),
    "weights as they are": (dict(experts=4, renormalise=False), "not renormalised"),
    "shards of their own": (dict(method="split", experts=2, granularity=4, router="from:RUN"), "each by itself"),
}


def given(options, num_choices):
    if options.router == "random":
        return None
    moe = dataclasses.replace(SIGMOID, num_experts=num_choices, router=dataclasses.replace(SIGMOID.router, k=2))
    moe = SIGMOID if num_choices == 8 else dataclasses.replace(moe, router=dataclasses.replace(moe.router, k=2))
    model = dataclasses.replace(SHAPE, layers=(LayerGroup((moe,), 3),))
    return model, reader(model, seed=1)


@pytest.mark.parametrize("name", KEEP)
def test_the_function_is_kept(name):
    options = Options(**KEEP[name])
    routers = given(options, 2)
    if routers is not None:
        options = dataclasses.replace(options, top_k=4)
    plan, made = upcycled(options, routers)
    found = differs(plan, made)
    assert found.logits < 1e-5 and max(found.layers.values()) < 1e-5
    assert sorted(found.layers) == sorted(plan.mixtures) == ([1] if options.layers == "1" else [0, 1, 2])
    assert abs(found.losses[0] - found.losses[1]) < 1e-5
    assert "the function is kept" in upcycle.report(plan, found) and "\n  " not in upcycle.report(plan, found)


@pytest.mark.parametrize("name", CHANGE)
def test_what_changes_the_function_is_told(name):
    flags, reason = CHANGE[name]
    options = Options(**flags)
    plan, made = upcycled(options, given(options, 8))
    found = differs(plan, made)
    assert found.logits > 1e-3 and min(found.layers.values()) > 1e-3
    told = upcycle.report(plan, found)
    assert "the function is not kept" in told and reason in told and f"{max(found.layers.values()):.1e}" in told


def test_drop_draws_the_same_units_of_all_three_matrices_anew():
    plan, made = upcycled(Options(method="drop", experts=3, drop=0.25))
    stored, changed = parameters(DENSE), []
    for matrix, axis in (("gate", 1), ("up", 1), ("down", 2)):
        new = made[f"layers/0/0/feed_forward/experts/buckets/0/{matrix}"]
        old = stored[f"layers/0/0/feed_forward/{matrix}"][:, None]
        changed.append((new != old).any(axis=2 if axis == 1 else 3))
        assert ((new != old).all(axis=2 if axis == 1 else 3) == changed[-1]).all()  # units as a whole
        fresh = (new - old * 0)[new != old]
        assert abs(fresh.std() / old.std() - 1) < 0.1 and abs(fresh.mean()) < 0.05
    assert (changed[0] == changed[1]).all() and (changed[0] == changed[2]).all()
    assert (changed[0].sum(-1) == 6).all()  # of 24 in every expert
    assert (changed[0][0, 0] != changed[0][0, 1]).any() and (changed[0][0, 0] != changed[0][1, 0]).any()
    assert all(moe.router == TopK(2) for moe in plan.mixtures.values())


def test_routers_come_from_the_run_with_state_and_rule():
    options = Options(experts=8, router="from:RUN")
    model, read = given(options, 8)
    plan, made = upcycled(options, (model, read))
    assert all(moe.router == SIGMOID.router for moe in plan.mixtures.values())
    for name in ("weight", "bias"):
        expected = read(f"layers/0/0/feed_forward/router/{name}", ())
        np.testing.assert_array_equal(made[f"layers/0/0/feed_forward/router/{name}"], expected)
    budget = dataclasses.replace(model, layers=(LayerGroup((MoE(8, 4, Nucleus(0.3, experts_per_token=2.0)),), 3),))
    plan, made = upcycled(options, (budget, reader(budget, seed=1)))
    np.testing.assert_allclose(made["layers/0/0/feed_forward/router/p"], [0.3] * 3)


def test_experts_make_up_for_what_a_router_without_preference_gives():
    def times(router):
        return scale(MoE(8, 4, router), routed=2)

    assert times(TopK(2)) == 2 and times(TopK(2, scale=4.0)) == 0.5
    assert times(TopK(2, renormalise=False)) == 2 / (2 / 8)
    assert times(TopK(2, "sigmoid", renormalise=False, scale=4.0)) == 2 / (4 * 2 * 0.5)
    assert times(Nucleus(0.4)) == 2 / (4 / 8)  # four of an eighth each are more than 0.4


def test_layers_are_named():
    assert parse_layers("all", 3) == [0, 1, 2] and parse_layers("every:2", 5) == [1, 3]
    assert parse_layers("4,1-2, 0", 5) == [0, 1, 2, 4]
    plan, _ = upcycled(Options(experts=2, layers="every:2"))
    assert [isinstance(each, MoE) for each in feed_forwards(plan.model)] == [False, True, False]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (dict(granularity=5), "granularity = 5 does not divide the 24 hidden features"),
        (dict(granularity=2, shared=2), "shared is 2; it must be less than granularity = 2"),
        (dict(top_k=1, nucleus=0.3), "top_k and nucleus exclude each other"),
        (dict(experts=2, top_k=3), "router.k is 3; it must be between 1 and num_experts = 2"),
        (dict(router="RUN"), "router is 'RUN'; it must be random or from:RUN"),
        (dict(layers="2-3"), "layers: 2-3 is not among the 3 layers, 0 to 2"),
        (dict(layers="x"), "layers is 'x'; it must be all, every:N, or a list such as 2,4,6-11"),
        (dict(router="from:RUN", experts=4), "layer 0 chooses from 8 experts and 0 identity experts; it must be 4 exp"),
    ],
)
def test_what_cannot_be_is_one_line(flags, says):
    with pytest.raises(InputError, match=says.replace(".", r"\.")):
        options = Options(**flags)
        Plan(DENSE, reader(DENSE), options, given(options, 8))


def test_mixtures_are_no_dense_layers():
    mixed = dataclasses.replace(SHAPE, layers=(LayerGroup((Dense(24), MoE(4, 8))),))
    plan = Plan(mixed, reader(mixed), Options(experts=2), None)
    assert list(plan.mixtures) == [0]
    with pytest.raises(InputError, match="layer 1 is a mixture already"):
        Plan(mixed, reader(mixed), Options(experts=2, layers="0-1"), None)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory) -> Path:
    settings = config.Config(model=DENSE, data=config.Data(sources=(config.Files("/none/*.txt"),), seq_len=32))
    with RunDirectory.open(tmp_path_factory.mktemp("dense")) as run:
        run.write_config(recipe.to_dict(settings))
        tokenizer.load(config.Data()).save(run.tokenizer)
        checkpoints = Checkpoints(run.checkpoints, keep=1)
        state = training.create_state(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))
        checkpoints.save(7, training.checkpoint_items(state, {"tokenizer": "t"}), metadata=recipe.to_dict(settings))
        checkpoints.close()
    return run.path


def test_the_command_makes_a_run(dense_run, tmp_path, capsys):
    upcycle.main([str(dense_run), str(tmp_path / "moe"), "--experts", "4"])
    told = capsys.readouterr().out
    assert "the function is kept" in told and "of random tokens" in told
    made = jmoe.load(tmp_path / "moe")
    assert made.step == 0 and feed_forwards(made.settings.model) == [MoE(4, 24, TopK(2))] * 3
    tokens = batch().tokens
    np.testing.assert_allclose(made.logits(tokens), jmoe.load(dense_run).logits(tokens), rtol=1e-4, atol=1e-5)
    noted = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    assert (noted["from"], noted["step"], noted["options"]["experts"]) == (str(dense_run), 7, 4)
    with pytest.raises(InputError, match="moe"):  # it is there already
        upcycle.main([str(dense_run), str(tmp_path / "moe"), "--experts", "4"])
    for flags in (["--granularity", "5"], ["--data", "/none/*.txt"], ["--router", "from:/none"]):
        with pytest.raises(InputError):
            upcycle.main([str(dense_run), str(tmp_path / "other"), *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
