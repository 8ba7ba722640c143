import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config
from jmoe.model.router import Router, nucleus, top_k

MODEL = config.Model(d_model=8)


def probabilities(tokens=200, experts=16, sharpness=2.0, seed=0):
    logits = np.random.default_rng(seed).normal(size=(tokens, experts)) * sharpness
    return jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=-1)


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
    ids, weights, used = (np.asarray(x) for x in nucleus(P, p, config.Nucleus(p).slots(16)))
    for row, row_ids, row_weights, row_used in zip(np.asarray(P), ids, weights, used, strict=True):
        expected = nucleus_loop(row, np.float32(p))
        assert row_ids[row_used].tolist() == expected
        assert (row_weights[row_used] == row[expected]).all()  # raw probabilities, not renormalised


@pytest.mark.parametrize("experts", [1, 2, 7, 10, 16, 64, 100])
@pytest.mark.parametrize("p", [0.01, 0.29, 0.3, 0.4, 0.5, 0.7, 0.99, 1.0])
def test_the_slot_bound_holds_for_uniform_probabilities(p, experts):
    """Uniform probabilities need the most experts: ⌊pE⌋ + 1, capped at E, by integer arithmetic in hundredths."""
    assert config.Nucleus(p).slots(experts) == min(experts, round(p * 100) * experts // 100 + 1)


def test_top_k_takes_the_k_best_and_renormalises():
    P = probabilities()
    ids, weights, used = top_k(P, 3)
    expected = np.argsort(-np.asarray(P), axis=1, kind="stable")[:, :3]
    assert (np.asarray(ids) == expected).all() and bool(used.all())
    best = np.take_along_axis(np.asarray(P), expected, axis=1)
    np.testing.assert_allclose(weights, best / best.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("kind", [config.TopK(2), config.Nucleus(0.4)])
def test_padding_goes_nowhere_and_counts_nowhere(kind):
    router = Router(config.MoE(num_experts=5, router=kind), MODEL, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(20, 8)) * 10, jnp.float32)
    valid = jnp.arange(20) % 3 != 0
    routing = router(tokens, valid)
    alone = router(tokens[valid], jnp.ones(int(valid.sum()), bool))

    assert (routing.expert_ids[~valid] == 5).all() and (routing.combine_weights[~valid] == 0).all()
    assert (routing.expert_ids[valid] == alone.expert_ids).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), routing.stats, alone.stats)
    assert float(routing.stats.tokens_per_expert.sum()) == float((routing.expert_ids < 5).sum())
    np.testing.assert_allclose(routing.stats.probability_per_expert.sum(), valid.sum(), rtol=1e-6)


def test_routing_is_float32_under_bfloat16_activations():
    router = Router(config.MoE(num_experts=5), MODEL, jax.random.key(0))
    routing = router(jnp.ones((3, 8), jnp.bfloat16), jnp.ones(3, bool))
    assert routing.combine_weights.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(routing.stats))
