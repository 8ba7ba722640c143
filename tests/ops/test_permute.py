import re

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.model.dispatch import plan
from jmoe.ops.permute import combine, dispatch

T, K, D, E = 13, 3, 4, 5


def slots(seed=0):
    rng = np.random.default_rng(seed)
    expert_ids = rng.integers(0, E + 1, (T, K)).astype(np.int32)  # E: no expert
    tokens = rng.normal(size=(T, D)).astype(np.float32)
    weights = rng.random((T, K)).astype(np.float32)
    return jnp.asarray(expert_ids), jnp.asarray(tokens), jnp.asarray(weights)


def test_plan_sorts_by_expert_and_keeps_the_order_of_tokens():
    expert_ids, _, _ = slots()
    order, inverse, used, group_sizes = (np.asarray(x) for x in plan(expert_ids, E))
    expert_ids = np.asarray(expert_ids)
    flat = expert_ids.reshape(-1)
    assert (order == np.argsort(flat, kind="stable")).all()
    assert (order[inverse.reshape(-1)] == np.arange(T * K)).all()
    assert (used == (expert_ids < E)).all()
    assert (group_sizes == [(flat == e).sum() for e in range(E)]).all()


def there_and_back(tokens, weights, expert_ids):
    order, inverse, used, group_sizes = plan(expert_ids, E)
    rows = dispatch(tokens, order, inverse, used)
    # An elementwise stand-in for experts that differ: row r of expert e becomes rows[r] * (e + 1).
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows.shape[0]), side="right")
    rows = jnp.where((expert < E)[:, None], jnp.sin(rows) * (expert + 1.0)[:, None], jnp.nan)
    return combine(rows, weights, order, inverse, used)


def direct(tokens, weights, expert_ids):
    scale = jnp.where(expert_ids < E, weights * (expert_ids + 1.0), 0.0).sum(1)
    return jnp.sin(tokens) * scale[:, None]


def test_dispatch_and_combine_equal_the_direct_sum_with_gradients():
    expert_ids, tokens, weights = slots()
    cotangent = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)

    def run(f):
        out, pullback = jax.vjp(lambda t, w: f(t, w, expert_ids), tokens, weights)
        return out, *pullback(jnp.asarray(cotangent))

    for got, want in zip(run(there_and_back), run(direct), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_backward_pass_has_no_scatter_add():
    expert_ids, tokens, weights = slots()
    loss = lambda t, w: there_and_back(t, w, expert_ids).sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(tokens, weights))
    assert "gather" in program
    assert not re.search(r"f32\[[0-9,]*\] = scatter-add", program)  # counting tokens of each expert, in int32, is one
