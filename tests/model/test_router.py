import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config
from jmoe.model.router import Router, balance_bias, nucleus, steer_threshold, top_k

MODEL = config.Model(d_model=8)


def logits(tokens=200, experts=16, sharpness=2.0, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, experts)) * sharpness, jnp.float32)


def probabilities(**kwargs):
    return jax.nn.softmax(logits(**kwargs), axis=-1)


# -------------------------------------------------------------------------------------------------------------- nucleus


def nucleus_loop(row, p):
    """The rule as the paper words it: add experts in descending order until their sum exceeds p."""
    chosen, total = [], np.float32(0)
    for expert in np.argsort(-row, kind="stable"):
        chosen.append(int(expert))
        total += row[expert]
        if total > p:
            break
    return chosen


@pytest.mark.parametrize("p", [0.1, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("sharpness", [0.0, 0.3, 2.0, 10.0])
def test_nucleus_is_the_smallest_set_that_exceeds_p(p, sharpness):
    P = probabilities(sharpness=sharpness)
    chosen = jax.tree.map(np.asarray, nucleus(P, p, config.Nucleus(p).bound(16)))
    assert not chosen.dropped.any()
    for row, row_ids, row_weights, row_used in zip(np.asarray(P), chosen.ids, chosen.weights, chosen.used, strict=True):
        expected = nucleus_loop(row, np.float32(p))
        assert row_ids[row_used].tolist() == expected
        assert (row_weights[row_used] == row[expected]).all()  # raw probabilities, not renormalised


def test_a_tighter_limit_drops_the_least_probable_and_counts_them():
    P, p = probabilities(sharpness=0.5), 0.5
    rule = config.Nucleus(p, max_slots=3)
    assert rule.slots(16) == 3
    chosen = jax.tree.map(np.asarray, nucleus(P, p, rule.bound(16), rule.max_slots))
    assert chosen.ids.shape == (200, 3)
    for row, ids, used, dropped in zip(np.asarray(P), chosen.ids, chosen.used, chosen.dropped, strict=True):
        expected = nucleus_loop(row, np.float32(p))
        assert ids[used].tolist() == expected[:3] and dropped == max(0, len(expected) - 3)
    assert chosen.dropped.any()


@pytest.mark.parametrize("experts", [1, 2, 7, 10, 16, 64, 100])
@pytest.mark.parametrize("p", [0.01, 0.29, 0.3, 0.4, 0.5, 0.7, 0.99, 1.0])
def test_the_slot_bound_holds_for_uniform_probabilities(p, experts):
    """Uniform probabilities need the most experts: ⌊pE⌋ + 1, capped at E, by integer arithmetic in hundredths."""
    assert config.Nucleus(p).slots(experts) == min(experts, round(p * 100) * experts // 100 + 1)


@pytest.mark.parametrize("budget", [1.5, 3.0])
def test_a_budget_is_held_by_moving_p(budget):
    """From either side, and while the router's certainty changes under it."""
    rule = config.Nucleus(p=0.5, experts_per_token=budget)
    assert rule.slots(16) == 16  # p may move anywhere
    p, means = jnp.array([0.5]), []

    @jax.jit
    def step(p, P):
        mean = nucleus(P, p[0], 16).used.sum(-1).mean()
        return steer_threshold(p, mean, rule), mean

    for i in range(300):
        p, mean = step(p, probabilities(sharpness=0.2 + 3.0 * min(i, 200) / 200, seed=i))
        means.append(float(mean))
    assert abs(means[0] - budget) > 1.0
    assert abs(np.mean(means[-50:]) - budget) < 0.05 * budget


# ---------------------------------------------------------------------------------------------------------------- top-k


def test_top_k_takes_the_k_best_and_renormalises():
    P = probabilities()
    chosen = top_k(P, config.TopK(3))
    expected = np.argsort(-np.asarray(P), axis=1, kind="stable")[:, :3]
    assert (np.asarray(chosen.ids) == expected).all() and bool(chosen.used.all())
    best = np.take_along_axis(np.asarray(P), expected, axis=1)
    np.testing.assert_allclose(chosen.weights, best / best.sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(top_k(P, config.TopK(3, renormalise=False, scale=2.5)).weights, 2.5 * best, rtol=1e-6)


def test_softmax_after_the_top_k_is_softmax_before_it_renormalised():
    """So that one switch serves both orders; values and gradients."""
    x = logits()

    def after(x):
        best, _ = jax.lax.top_k(x, 2)
        return jax.nn.softmax(best, axis=-1)

    def before(x):
        return top_k(jax.nn.softmax(x, axis=-1), config.TopK(2)).weights

    for got, want in zip(jax.vjp(before, x), jax.vjp(after, x), strict=True):
        if callable(got):
            cotangent = jax.random.normal(jax.random.key(0), (200, 2))
            got, want = got(cotangent)[0], want(cotangent)[0]
        np.testing.assert_allclose(got, want, atol=1e-6)


def deepseek_loop(scores, bias, rule):
    """The released code of DeepSeek-V3, a token at a time: groups by their two best, then experts, by biased score."""
    chosen = []
    for row in scores:
        ranked = (row + bias).reshape(rule.groups, -1)
        best = np.argsort(-np.sort(ranked, axis=1)[:, -2:].sum(1), kind="stable")[: rule.groups_per_token]
        allowed = np.isin(np.arange(rule.groups), best)[:, None]
        ids = np.argsort(-np.where(allowed, ranked, -np.inf).reshape(-1), kind="stable")[: rule.k]
        chosen.append((ids, row[ids] / row[ids].sum() * rule.scale))
    ids, weights = zip(*chosen, strict=True)
    return np.array(ids), np.array(weights)


def test_sigmoid_groups_scale_and_bias_are_those_of_deepseek():
    rule = config.TopK(3, score="sigmoid", scale=2.5, groups=4, groups_per_token=2, bias_rate=1e-3)
    scores = jax.nn.sigmoid(logits())
    bias = np.random.default_rng(1).normal(size=16).astype(np.float32) * 0.3
    chosen = top_k(scores, rule, jnp.asarray(bias))
    ids, weights = deepseek_loop(np.asarray(scores), bias, rule)
    assert (np.asarray(chosen.ids) == ids).all()
    assert (ids != deepseek_loop(np.asarray(scores), 0 * bias, rule)[0]).any()  # the bias matters here
    np.testing.assert_allclose(chosen.weights, weights, rtol=1e-6)
    assert all(len(set(row // 4)) <= 2 for row in ids)
    grad = jax.grad(lambda b: top_k(scores, rule, b).weights.sum())(jnp.asarray(bias))
    assert not np.asarray(grad).any()


def test_the_bias_balances_a_lopsided_router():
    x = logits(tokens=1000, sharpness=0.3) + 0.3 * jnp.arange(16)[None] / 16
    rule = config.TopK(2, bias_rate=1e-3)

    @jax.jit
    def step(bias):
        ids = top_k(jax.nn.softmax(x, axis=-1), rule, bias).ids
        counts = jnp.bincount(ids.reshape(-1), length=16).astype(jnp.float32)
        return balance_bias(bias, counts, rule.bias_rate), counts.max() / counts.mean()

    bias, first = step(jnp.zeros(16))
    for _ in range(80):
        bias, imbalance = step(bias)
    assert float(first) > 1.8 and float(imbalance) < 1.15
    assert abs(float(bias.sum())) < 1e-6


def test_the_bias_moves_by_the_sign_and_is_recentred():
    moved = balance_bias(jnp.zeros((2, 4)), jnp.array([[5.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]), 0.1)
    np.testing.assert_allclose(moved, [[-0.15, 0.05, 0.05, 0.05], [0, 0, 0, 0]], atol=1e-7)


# --------------------------------------------------------------------------------------------------------------- router

RULES = [
    config.TopK(2),
    config.TopK(2, score="sigmoid", groups=2, bias_rate=0.1),
    config.Nucleus(0.4),
    config.Nucleus(0.6, max_slots=2),
]


@pytest.mark.parametrize("identity", [0, 3])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_padding_goes_nowhere_and_counts_nowhere(rule, identity):
    E = 5 if identity else 6
    moe = config.MoE(num_experts=E, router=rule, identity_experts=identity)
    router = Router(moe, MODEL, jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10, 8)) * 10, jnp.float32)
    valid = jnp.arange(20).reshape(2, 10) % 10 < 7  # padding at the end of each row
    routing, alone = router(x, valid), router(x[:, :7], jnp.ones((2, 7), bool))
    kept = np.asarray(valid).reshape(-1)

    assert (routing.expert_ids[~kept] == E).all()
    assert not any(np.asarray(w)[~kept].any() for w in (routing.combine_weights, routing.identity_weights))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), routing.stats, alone.stats)
    for got, want in zip(routing[:3], alone[:3], strict=True):
        np.testing.assert_array_equal(np.asarray(got)[kept], want)
    stats = jax.tree.map(np.asarray, routing.stats)
    assert stats.tokens_per_expert[:E].sum() == (np.asarray(routing.expert_ids) < E).sum()
    np.testing.assert_allclose(stats.probability_per_expert.sum(), kept.sum(), rtol=1e-6)
    per_token = (np.asarray(routing.expert_ids)[kept] < E).sum(1)
    np.testing.assert_array_equal(stats.tokens_per_count, np.bincount(per_token, minlength=moe.slots + 1))
    assert (stats.dropped > 0) == (getattr(rule, "max_slots", None) is not None)


def test_identity_experts_weigh_the_token_itself():
    """The same rule over experts and identity experts; what falls to these is in `identity_weights`."""
    moe = config.MoE(num_experts=4, identity_experts=4, router=config.TopK(3))
    router = Router(moe, MODEL, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 50, 8)) * 20
    routing = router(x, jnp.ones((2, 50), bool))
    plain = top_k(jax.nn.softmax(x.reshape(100, 8) @ router.weight[...], axis=-1), config.TopK(3))
    expert = np.asarray(plain.ids) < 4
    np.testing.assert_array_equal(routing.expert_ids, np.where(expert, plain.ids, 4))
    np.testing.assert_allclose(routing.identity_weights, np.where(expert, 0, plain.weights).sum(1), rtol=1e-5)
    np.testing.assert_allclose(routing.combine_weights.sum(1) + routing.identity_weights, 1.0, rtol=1e-5)
    assert 0 < expert.sum() < expert.size and float(routing.stats.tokens_per_expert[4:].sum()) == (~expert).sum()


def test_routing_is_float32_under_bfloat16_activations():
    router = Router(config.MoE(num_experts=5), MODEL, jax.random.key(0))
    routing = router(jnp.ones((1, 3, 8), jnp.bfloat16), jnp.ones((1, 3), bool))
    assert routing.combine_weights.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(routing.stats))


@pytest.mark.parametrize("rule", [config.TopK(2), config.TopK(2, score="sigmoid"), config.Nucleus(0.5)], ids=str)
def test_statistics_are_those_of_the_probabilities(rule):
    """Against NumPy in float64, per sequence and in all."""
    router = Router(config.MoE(num_experts=5, router=rule), MODEL, jax.random.key(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (3, 7, 8)) * 10)
    stats = router(jnp.asarray(x), jnp.ones((3, 7), bool)).stats
    z = x.astype(np.float64) @ np.asarray(router.weight[...], np.float64)
    scores = 1 / (1 + np.exp(-z)) if getattr(rule, "score", "") == "sigmoid" else np.exp(z)
    P = scores / scores.sum(-1, keepdims=True)
    np.testing.assert_allclose(stats.entropy, -(P * np.log(P)).sum(), rtol=1e-4)
    np.testing.assert_allclose(stats.z_squared, (np.log(np.exp(z).sum(-1)) ** 2).sum(), rtol=1e-4)
    np.testing.assert_allclose(stats.probability_per_expert, P.sum((0, 1)), rtol=1e-4)
    per_sequence = []
    for sequence, mass in zip(x, P, strict=True):
        counts = router(jnp.asarray(sequence[None]), jnp.ones((1, 7), bool)).stats.tokens_per_expert
        per_sequence.append(5 * (np.asarray(counts) / counts.sum() * mass.sum(0)).sum())
    np.testing.assert_allclose(stats.sequence_balance, sum(per_sequence), rtol=1e-4)


def test_no_scatter_in_either_pass():
    """Scatters are serial on CPU and slow on TPU; counting and picking are sums."""
    moe = config.MoE(num_experts=5, router=config.TopK(2, score="sigmoid", bias_rate=0.1))
    for settings in (moe, dataclasses.replace(moe, router=config.Nucleus(0.4))):
        router = Router(settings, MODEL, jax.random.key(0))

        def total(x, router=router):
            routing = router(x, jnp.ones((1, 4), bool))
            return routing.combine_weights.sum() + routing.stats.entropy

        assert "scatter" not in str(jax.make_jaxpr(jax.grad(total))(jnp.ones((1, 4, 8))))
