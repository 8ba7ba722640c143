"""Fewer experts: what they do on text, which stay, and what the smaller model computes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe import config, recipe, sharding, training
from jmoe.batch import Batch
from jmoe.checkpoint import Checkpoints, flatten, unflatten
from jmoe.config import Dense, InputError, LayerGroup, MoE, Nucleus, TopK
from jmoe.convert import merge, prune
from jmoe.convert.calibration import Observed, observe
from jmoe.convert.compress import Fewer, alone, choose, parse_counts, smaller, stand_in
from jmoe.convert.held_out import difference
from jmoe.convert.layers import by_layer, write_layers
from jmoe.convert.mapping import parameter_shapes
from jmoe.data import tokenizer
from jmoe.flops import feed_forwards
from jmoe.model.transformer import Transformer
from jmoe.model.walk import walk
from jmoe.run_directory import RunDirectory

MIXED = MoE(6, (4, 4, 4, 8, 8, 8), TopK(2, bias_rate=1e-3), identity_experts=1, shared_d_ff=8)
MATRICES = ("gate", "up", "down")
NUCLEUS = MoE(6, 8, Nucleus(0.4, experts_per_token=2.0), shared_d_ff=4)
MODEL = config.Model(
    257,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    init_std=0.3,
    layers=(LayerGroup((Dense(8), MIXED)), LayerGroup((NUCLEUS,))),
)


@functools.cache
def parameters():
    return Transformer(MODEL, jax.random.key(0))


@functools.cache
def stored():
    return {name: np.asarray(leaf) for name, leaf in flatten(parameters()).items()}


def read(name, index):
    return stored()[name][index]


def batch():
    tokens = np.random.default_rng(0).integers(0, 257, (2, 12), np.int32)
    segments = np.where(np.arange(12) < 9, 1, 0).astype(np.int32)[None].repeat(2, 0)
    return Batch(tokens, tokens, segments, np.arange(12, dtype=np.int32)[None].repeat(2, 0), segments > 0)


@pytest.fixture(scope="module")
def observed():
    return observe(parameters(), MODEL, [batch(), batch()])


def made_of(groups, observed):
    fewer = Fewer(MODEL, read, groups, observed)
    made = {name: np.full(shape, np.nan, np.float32) for name, shape in parameter_shapes(fewer.model).items()}
    write_layers(fewer.model, read, fewer.of_layer, lambda name, i, part: made[name].__setitem__(i, part))
    assert not any(np.isnan(array).any() for array in made.values())
    abstract = jax.eval_shape(lambda key: Transformer(fewer.model, key), jax.random.key(0))
    return fewer, unflatten({name: jnp.asarray(array) for name, array in made.items()}, abstract)


def experts_of(layer):
    return [expert for bank in layer.experts.weights() for expert in zip(*bank, strict=True)]


def test_what_is_observed_is_the_sum_over_tokens(observed):
    assert sorted(observed) == [1, 2]
    for visit in list(walk(parameters(), MODEL, batch()))[1:]:
        layer, E = visit.layer.feed_forward, 6
        routing = layer.router(visit.inputs, jnp.asarray(batch().segment_ids > 0))
        x, sums = visit.inputs.reshape(24, 16), {name: np.zeros(E) for name in ("assignments", "weight", "saliency")}
        for t in range(24):
            ids, weights = np.asarray(routing.expert_ids[t]), np.asarray(routing.combine_weights[t], np.float64)
            for e, weight in zip(ids, weights, strict=True):
                if e < E:
                    gate, up, down = experts_of(layer)[e]
                    out = (jax.nn.silu(x[t] @ gate) * (x[t] @ up)) @ down
                    sums["assignments"][e] += 1
                    sums["weight"][e] += weight
                    sums["saliency"][e] += weight / weights.sum() * float(jnp.linalg.norm(out))
        found = observed[visit.number]
        assert float(found.tokens) == 36  # of two batches, without padding
        for name, expected in sums.items():
            np.testing.assert_allclose(getattr(found, name), 2 * expected, rtol=1e-4, atol=1e-5)
        logits = np.asarray(x @ layer.router.weight[...][:, :E])[np.asarray(batch().segment_ids > 0).reshape(-1)]
        np.testing.assert_allclose(found.logits, 2 * logits.T @ logits, rtol=1e-4, atol=1e-3)


def sums(count, saliency):
    ones = np.ones(len(count))
    return Observed(np.float64(8), np.array(count, float), ones, np.array(saliency, float), np.eye(len(count)))


def test_scores():
    of = sums([4, 2, 0], [2.0, 4.0, 0.0])
    np.testing.assert_allclose(prune.score(of, "reap"), [0.5, 2.0, 0.0])
    np.testing.assert_allclose(prune.score(of, "frequency"), [4, 2, 0])


def test_choice_by_layer_and_by_one_threshold():
    moes = {0: MoE(4, 8, TopK(2)), 3: MoE(4, 8, Nucleus(0.4))}
    scores = {0: np.array([4.0, 1.0, 2.0, 3.0]), 3: np.array([10.0, 1.0, 1.0, 12.0])}
    assert choose(moes, scores, 0.5, "layer", {}) == {0: [0, 3], 3: [0, 3]}
    assert choose(moes, scores, 3.0, "layer", {3: 0}) == {0: [0, 2, 3], 3: []}
    # Over their means: 1.6 .4 .8 1.2 and 1.67 .17 .17 2; the first layer keeps two whatever they are.
    assert choose(moes, scores, 0.625, "global", {}) == {0: [0, 2, 3], 3: [0, 3]}
    assert choose(moes, scores, 0.25, "global", {}) == {0: [0, 3], 3: [3]}
    grouped = {0: MoE(4, 8, TopK(1, groups=2))}
    assert choose(grouped, {0: np.array([9.0, 8.0, 1.0, 2.0])}, 2.0, "layer", {}) == {0: [0, 3]}
    assert parse_counts("0=0, 3=2", [0, 3]) == {0: 0, 3: 2}
    for text in ("1=2", "0", "0=x"):
        with pytest.raises(InputError, match="layers"):
            parse_counts(text, [0, 3])
    with pytest.raises(InputError, match="layer 0 has 4 experts; it cannot keep 5"):
        choose(moes, scores, 5.0, "layer", {})
    with pytest.raises(InputError, match="2 groups of experts; 3 cannot be shared out"):
        choose(grouped, {0: np.ones(4)}, 3.0, "layer", {})


def test_settings_follow_the_experts():
    assert smaller(MIXED, [1, 4, 5]).d_ff == (4, 8, 8) and smaller(MIXED, [0, 1]).d_ff == 4
    assert smaller(MoE(4, 8, TopK(3)), [1, 2]).router == TopK(2)
    grouped = MoE(8, 8, TopK(4, groups=4, groups_per_token=2))
    assert smaller(grouped, [0, 2, 4, 6]).router == dataclasses.replace(grouped.router, k=2)
    of = Observed(np.float64(8), np.array([8.0, 8, 0]), np.array([2.0, 2, 0]), np.array([1.0, 3, 2]), np.eye(3))
    assert stand_in(MoE(3, 8), of) == ([1, 2], 0.25)
    budget = Nucleus(0.4, experts_per_token=3.0)
    assert smaller(MoE(4, 8, budget), [1, 2]).router == dataclasses.replace(budget, experts_per_token=2.0)
    assert smaller(MoE(8, 8, Nucleus(0.4), widths="hybrid"), [0, 7]).expert_widths == (4, 16)


def test_experts_that_no_token_goes_to_can_go(observed):
    """Top-k renormalises over what is chosen, so that nothing changes without them."""
    used = np.flatnonzero(observed[1].assignments).tolist()
    assert 2 <= len(used) < 6, "the test needs an expert without tokens"
    groups = {1: [alone(e) for e in used], 2: [alone(e) for e in range(6)]}
    fewer, params = made_of(groups, observed)
    new = feed_forwards(fewer.model)[1]
    assert isinstance(new, MoE) and new.expert_widths == tuple(MIXED.expert_widths[e] for e in used)
    found = difference(parameters(), params, MODEL, fewer.model, batch())
    assert found.logits < 1e-5 and found.layers[1] < 1e-5 and list(found.layers) == [1]


def test_a_layer_without_experts_is_dense(observed):
    fewer, params = made_of({1: [alone(e) for e in range(6)], 2: []}, observed)
    experts, share = fewer.into_dense[2]
    count = round(float(observed[2].assignments.sum() / observed[2].tokens))
    assert feed_forwards(fewer.model)[2] == Dense(8 * count + 4) and len(experts) == count
    assert set(experts) == set(np.argsort(-observed[2].saliency)[:count].tolist())
    old, new = list(walk(parameters(), MODEL, batch()))[2], list(walk(params, fewer.model, batch()))[2]
    x = old.inputs.reshape(24, 16)
    outputs = [
        (jax.nn.silu(x @ g) * (x @ u)) @ d for g, u, d in (experts_of(old.layer.feed_forward)[e] for e in experts)
    ]
    expected = share * sum(outputs) + old.layer.feed_forward.shared(old.inputs).reshape(24, 16)
    np.testing.assert_allclose(new.outputs.reshape(24, 16), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(share * count, observed[2].weight.sum() / observed[2].tokens, rtol=1e-6)
    with pytest.raises(InputError, match="layer 1 has identity experts, which a dense layer cannot hold"):
        Fewer(MODEL, read, {1: []}, observed)


def test_merging_weighs_by_tokens_and_puts_units_in_order():
    draw = np.random.default_rng(0)
    matrices = draw.normal(size=(16, 8)), draw.normal(size=(16, 8)), draw.normal(size=(8, 16))
    order = draw.permutation(8)
    shuffled = matrices[0][:, order], matrices[1][:, order], matrices[2][order]
    np.testing.assert_array_equal(order[merge.unit_order(matrices, shuffled)], np.arange(8))

    products = np.eye(6) + 0.5 * (np.eye(6, k=1) + np.eye(6, k=-1))
    of = Observed(np.float64(9), np.array([6.0, 2, 0, 1, 3, 3]), np.ones(6), np.ones(6), products)
    assert merge.partners(MIXED, of, [0, 4]) == {0: [1, 2], 4: [3, 5]}  # within their widths
    assert merge.partners(MIXED, of, [0]) == {0: [1, 2]}
    length = np.array([1.0, 1, 9, 1, 1, 1])  # of an expert's logits, which does not make it more alike
    near = np.eye(6) + 0.5 * np.eye(6, k=1) + 0.5 * np.eye(6, k=-1) - 0.1 * (np.arange(6) == 2)[None]
    assert merge.partners(MIXED, of._replace(logits=near * length * length[:, None]), [0, 2])[0] == [1]
    groups = merge.merged(1, MIXED, of, [0, 4], by_layer(MODEL, read), align=False)
    assert [group.members for group in groups] == [(0, 1, 2), (4, 3, 5)]
    np.testing.assert_allclose(groups[0].shares, [0.75, 0.25, 0.0], atol=1e-6)
    fewer = Fewer(MODEL, read, {1: groups}, {1: of})
    old, new = (
        stored()["layers/0/1/feed_forward/experts/buckets/0/up"][0],
        fewer.of_layer(1, "feed_forward/experts/buckets/0/up"),
    )
    np.testing.assert_allclose(new, 0.75 * old[:1] + 0.25 * old[1:2], atol=1e-5)
    weight, cut = stored()["layers/0/1/feed_forward/router/weight"][0], fewer.of_layer(1, "feed_forward/router/weight")
    assert cut.shape == (16, 3)
    np.testing.assert_allclose(cut[:, 0], 0.75 * weight[:, 0] + 0.25 * weight[:, 1], atol=1e-5)
    np.testing.assert_array_equal(cut[:, 2], weight[:, 6])  # the identity expert


def test_merging_with_a_shuffled_copy_changes_nothing():
    stored_experts = {
        matrix: stored()[f"layers/0/1/feed_forward/experts/buckets/0/{matrix}"][0].copy() for matrix in MATRICES
    }
    order = np.array([2, 0, 3, 1])  # not its own inverse
    for matrix, experts in stored_experts.items():
        experts[1] = experts[0][order] if matrix == "down" else experts[0][:, order]

    def of_layer(layer, name):
        return stored_experts[name.rsplit("/", 1)[1]]

    of = Observed(np.float64(9), np.array([6.0, 2, 0, 1, 1, 1]), np.ones(6), np.ones(6), np.eye(6))
    group = merge.merged(1, MIXED, of, [0, 2], of_layer, align=True)[0]
    assert group.members == (0, 1)
    fewer = Fewer(MODEL, read, {1: [group]}, {1: of})
    fewer.old = of_layer
    for matrix, experts in stored_experts.items():
        made = fewer.of_layer(1, f"feed_forward/experts/buckets/0/{matrix}")
        np.testing.assert_allclose(made, experts[:1], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"document {number} of text, of which there is some more. " * 4)
    data = config.Data(sources=(config.Files(f"{folder}/*.txt"),), validation_fraction=0.5, seq_len=32)
    settings = config.Config(model=MODEL, data=data)
    with RunDirectory.open(folder / "run") as run:
        run.write_config(recipe.to_dict(settings))
        tokenizer.load(settings.data).save(run.tokenizer)
        checkpoints = Checkpoints(run.checkpoints, keep=1)
        state = training.create_state(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))
        checkpoints.save(7, training.checkpoint_items(state, {"tokenizer": "t"}), metadata=recipe.to_dict(settings))
        checkpoints.close()
    return run.path


@pytest.mark.slow
def test_the_commands_make_runs(run_dir, tmp_path, capsys):
    prune.main([str(run_dir), str(tmp_path / "pruned"), "--layers", "2=0", "--tokens", "64"])
    told = capsys.readouterr().out
    assert "layer 1: 3 of 6 experts\n" in told and "layer 2: 0 of 6 experts; dense" in told
    noted = json.loads((tmp_path / "pruned" / "compress.json").read_text())
    assert f"loss {noted['loss_before']:.4f} before, {noted['loss_after']:.4f} after" in told
    assert noted["step"] == 7 and 4 < noted["loss_before"] != noted["loss_after"] > 4
    made = jmoe.load(tmp_path / "pruned")
    assert [type(each) for each in feed_forwards(made.settings.model)] == [Dense, MoE, Dense]
    assert made.logits(batch().tokens).shape == (2, 12, 257)

    merge.main([str(run_dir), str(tmp_path / "merged"), "--by", "global", "--tokens", "64"])
    assert "; merged [[" in capsys.readouterr().out
    made = feed_forwards(jmoe.load(tmp_path / "merged").settings.model)
    assert sum(each.num_experts for each in made if isinstance(each, MoE)) == 6
    for flags in (["--keep", "7"], ["--keep", "1.5"], ["--layers", "0=1"], ["--calibrate", "/none/*.txt"]):
        with pytest.raises(InputError):
            prune.main([str(run_dir), str(tmp_path / "other"), *flags])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "pruned"]
