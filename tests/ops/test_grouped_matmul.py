"""One suite for every implementation, against a loop over experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import grouped_matmul as module
from jmoe.ops.grouped_matmul import grouped_matmul

ROWS, D, F = 300, 24, 40

IMPLEMENTATIONS = {
    "blocked": (module._blocked, module._blocked_weight_gradient),
    "ragged": (module._ragged, module._ragged_weight_gradient),
}

GROUP_SIZES = {
    "even": [100, 100, 100],
    "uneven": [1, 130, 0, 129, 40],
    "first and last empty": [0, 299, 0],
    "all rows to one": [0, 300, 0, 0],
    "one row": [0, 1, 0],
    "no row": [0, 0, 0],
    "rows left over": [17, 0, 128, 60],
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    forward, weight_gradient = IMPLEMENTATIONS[request.param]
    monkeypatch.setattr(module, "_forward", forward)
    monkeypatch.setattr(module, "_weight_gradient", weight_gradient)


def loop(rows, weights, group_sizes):
    """The definition, in float64 NumPy."""
    out, start = np.zeros((rows.shape[0], weights.shape[2])), 0
    for weight, size in zip(np.asarray(weights, np.float64), group_sizes, strict=True):
        out[start : start + size] = np.asarray(rows[start : start + size], np.float64) @ weight
        start += size
    return out


def loop_gradients(rows, weights, group_sizes, d_out):
    d_rows, d_weights, start = np.zeros(rows.shape), np.zeros(weights.shape), 0
    for e, size in enumerate(group_sizes):
        own = slice(start, start + size)
        d_rows[own] = np.asarray(d_out[own], np.float64) @ np.asarray(weights[e], np.float64).T
        d_weights[e] = np.asarray(rows[own], np.float64).T @ np.asarray(d_out[own], np.float64)
        start += size
    return d_rows, d_weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES.keys())
def test_values_and_gradients_match_the_loop(implementation, sizes, dtype):
    rng = np.random.default_rng(0)
    used = sum(sizes)
    rows = np.asarray(rng.normal(size=(ROWS, D)), jnp.dtype(dtype))
    weights = np.asarray(rng.normal(size=(len(sizes), D, F)), jnp.dtype(dtype))
    d_out = np.asarray(rng.normal(size=(ROWS, F)), jnp.dtype(dtype))
    # What lies past the groups must not be read into any result, nor its gradient.
    rows[used:], d_out[used:] = np.nan, np.nan

    @jax.jit
    def run(rows, weights, group_sizes, d_out):
        out, pullback = jax.vjp(lambda r, w: grouped_matmul(r, w, group_sizes), rows, weights)
        return out, *pullback(d_out)

    out, d_rows, d_weights = run(rows, weights, jnp.array(sizes, jnp.int32), d_out)
    assert (out.dtype, d_rows.dtype, d_weights.dtype) == (dtype,) * 3
    expected = (loop(rows, weights, sizes), *loop_gradients(rows, weights, sizes, d_out))
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for name, got, want in zip(("out", "d_rows", "d_weights"), (out, d_rows, d_weights), expected, strict=True):
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance * scale, err_msg=name)
    assert not np.asarray(out, np.float32)[used:].any()
    assert not np.asarray(d_rows, np.float32)[used:].any()


def test_the_platform_of_the_program_chooses():
    """Lowered for CPU the program holds the blocked loop; lowered for CUDA, from the same host, XLA's ragged dot."""
    shapes = (
        jax.ShapeDtypeStruct((8, 4), jnp.float32),
        jax.ShapeDtypeStruct((2, 4, 4), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    )
    traced = jax.jit(grouped_matmul).trace(*shapes)
    assert "while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "while" not in traced.lower(lowering_platforms=("cuda",)).as_text()
