import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import config
from jmoe.model import balance
from jmoe.model.router import Router, RouterStats

E, B, S = 6, 4, 10
T = jnp.float32(B * S)
ROUTER = Router(config.MoE(E, router=config.TopK(2)), config.Model(d_model=8, init_std=1.0), jax.random.key(0))
WIDTHS = (1, 1, 2, 2, 4, 4)


def stats(seed, rows=B):
    return ROUTER(jax.random.normal(jax.random.key(seed), (rows, S, 8)), jnp.ones((rows, S), bool)).stats


def test_formulas():
    own = stats(0)
    share = np.asarray(own.tokens_per_expert) / (2 * B * S)
    mean = np.asarray(own.probability_per_expert) / (B * S)
    relative = np.array(WIDTHS) / np.mean(WIDTHS)
    want = {
        "load_balance_loss": E * (share * mean).sum(),
        "sequence_balance_loss": float(own.sequence_balance) / (B * S),
        "router_z_loss": float(own.z_squared) / (B * S),
        "dynamic_loss": float(own.entropy) / (B * S),
        "parameter_penalty": E * (share * relative * mean).sum(),
    }
    got = balance.terms(own, own.tokens_per_expert, T, WIDTHS)
    for name, value in zip(balance.TERMS, got, strict=True):
        np.testing.assert_allclose(value, want[name], rtol=1e-5, err_msg=name)


def test_the_penalty_of_equal_widths_is_the_load_balance_loss():
    own = stats(0)
    args = own, own.tokens_per_expert, T
    assert float(balance.parameter_penalty(*args, (7,) * E)) == float(balance.load_balance_loss(*args))


def test_the_penalty_prefers_narrow_experts():
    """Its gradient pushes probability down for a wide expert more than for a narrow one of the same load."""
    own = stats(0)._replace(tokens_per_expert=jnp.full(E, 10.0))
    grad = jax.grad(lambda q: balance.parameter_penalty(own._replace(probability_per_expert=q), own[0], T, WIDTHS))
    np.testing.assert_allclose(grad(own.probability_per_expert) * T, np.array(WIDTHS) / np.mean(WIDTHS), rtol=1e-6)


def test_perfect_balance_costs_one():
    uniform = stats(0)._replace(tokens_per_expert=jnp.full(E, 7.0), probability_per_expert=jnp.full(E, T / E))
    np.testing.assert_allclose(balance.load_balance_loss(uniform, uniform[0], T), 1.0, rtol=1e-6)


def test_balance_within_sequences_is_more_than_balance_over_them():
    """Sequences that each use their own experts are balanced together, but not one by one."""
    weight = jnp.eye(8)[:, :E] * 20
    ROUTER_OF_FEATURES = jax.tree.map(lambda _: weight, ROUTER)
    x = jnp.repeat(jnp.eye(8)[:E, None] + 0.5 * jnp.eye(8)[jnp.arange(1, E + 1) % E][:, None], S, axis=1)
    own = ROUTER_OF_FEATURES(x, jnp.ones((E, S), bool)).stats
    total = jnp.float32(E * S)
    np.testing.assert_allclose(balance.load_balance_loss(own, own.tokens_per_expert, total), 1.0, rtol=1e-4)
    assert float(balance.sequence_balance_loss(own, total)) > 2.5


@pytest.mark.parametrize("term", range(len(balance.TERMS)), ids=balance.TERMS)
def test_micro_batches_add_up_to_the_batch(term):
    parts = [stats(seed) for seed in range(3)]
    whole = jax.tree.map(lambda *x: sum(x), *parts)
    summed = sum(balance.terms(part, whole.tokens_per_expert, 3 * T, WIDTHS)[term] for part in parts)
    np.testing.assert_allclose(summed, balance.terms(whole, whole.tokens_per_expert, 3 * T, WIDTHS)[term], rtol=1e-6)


def test_counts_have_no_gradient():
    own = stats(0)
    grad = jax.grad(lambda counts: balance.parameter_penalty(own, counts, T, WIDTHS))(own.tokens_per_expert)
    assert not np.asarray(grad).any()


def test_an_empty_batch_is_finite():
    zero = RouterStats(*(jnp.zeros_like(x) for x in stats(0)))
    assert not np.asarray(balance.terms(zero, zero.tokens_per_expert, jnp.float32(1), WIDTHS)).any()
