import jax.numpy as jnp
import numpy as np

from jmoe.ops.permute import plan, sum_slots

T, K, D, E = 13, 3, 4, 5


def slots(seed=0):
    return np.random.default_rng(seed).integers(0, E + 1, (T, K)).astype(np.int32)  # E: no expert


def test_plan_sorts_by_expert_and_keeps_the_order_of_tokens():
    expert_ids = slots()
    order, inverse, used, group_sizes = (np.asarray(x) for x in plan(jnp.asarray(expert_ids), E))
    flat = expert_ids.reshape(-1)
    assert (order == np.argsort(flat, kind="stable")).all()
    assert (order[inverse.reshape(-1)] == np.arange(T * K)).all()
    assert (used == (expert_ids < E)).all()
    assert (group_sizes == [(flat == e).sum() for e in range(E)]).all()


def test_slots_are_summed_and_what_unused_ones_point_to_is_not_read():
    expert_ids = slots()
    _, inverse, used, group_sizes = plan(jnp.asarray(expert_ids), E)
    rows = np.random.default_rng(1).normal(size=(T * K, D)).astype(np.float32)
    rows[int(group_sizes.sum()) :] = np.nan
    expected = [rows[np.asarray(i)[np.asarray(u)]].sum(0) for i, u in zip(inverse, used, strict=True)]
    np.testing.assert_allclose(sum_slots(jnp.asarray(rows), inverse, used), expected, rtol=1e-5, atol=1e-6)
