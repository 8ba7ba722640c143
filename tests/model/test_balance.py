import jax
import jax.numpy as jnp
import numpy as np

from jmoe.model.balance import dynamic_loss, load_balance_loss
from jmoe.model.router import RouterStats

E, T = 6, 40


def stats(P, ids):
    counts = jnp.asarray(np.bincount(np.asarray(ids).reshape(-1), minlength=E), jnp.float32)
    return RouterStats(counts, P.sum(0), -(P * jnp.log(P)).sum())


def random_routing(seed):
    P = jax.nn.softmax(jnp.asarray(np.random.default_rng(seed).normal(size=(T, E)), jnp.float32), axis=-1)
    return P, jax.lax.top_k(P, 2)[1]


def test_formulas():
    P, ids = random_routing(0)
    share = np.bincount(np.asarray(ids).reshape(-1), minlength=E) / (2 * T)
    own = stats(P, ids)
    np.testing.assert_allclose(
        load_balance_loss(own, own.tokens_per_expert, jnp.float32(T)), E * (share * np.mean(P, 0)).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(
        dynamic_loss(own, jnp.float32(T)), np.mean(-(np.asarray(P) * np.log(P)).sum(1)), rtol=1e-5
    )


def test_perfect_balance_costs_one():
    uniform = RouterStats(jnp.full(E, 7.0), jnp.full(E, T / E), jnp.float32(0))
    np.testing.assert_allclose(load_balance_loss(uniform, uniform.tokens_per_expert, jnp.float32(T)), 1.0, rtol=1e-6)


def test_micro_batches_add_up_to_the_batch():
    parts = [stats(*random_routing(seed)) for seed in range(3)]
    whole = jax.tree.map(lambda *x: sum(x), *parts)
    total = jnp.float32(3 * T)
    summed = sum(load_balance_loss(part, whole.tokens_per_expert, total) for part in parts)
    np.testing.assert_allclose(summed, load_balance_loss(whole, whole.tokens_per_expert, total), rtol=1e-6)


def test_counts_have_no_gradient():
    P, ids = random_routing(0)
    own = stats(P, ids)
    grad = jax.grad(lambda counts: load_balance_loss(own, counts, jnp.float32(T)))(own.tokens_per_expert)
    assert not np.asarray(grad).any()


def test_an_empty_batch_is_finite():
    zero = RouterStats(jnp.zeros(E), jnp.zeros(E), jnp.float32(0))
    assert float(load_balance_loss(zero, zero.tokens_per_expert, jnp.float32(1))) == 0.0
