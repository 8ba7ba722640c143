import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops.matmul import apart, matmul, transposed


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_values_and_gradients(dtype, tolerance):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 8)), dtype)
    weight = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    d_out = jnp.asarray(rng.normal(size=(2, 5, 6)), dtype)
    out, pullback = jax.vjp(matmul, x, weight)
    d_x, d_weight = pullback(d_out)
    assert out.dtype == d_x.dtype == dtype and d_weight.dtype == jnp.float32
    wide = [np.asarray(a.astype(jnp.float32)) for a in (x, weight.astype(dtype), d_out)]
    for got, want in (
        (out, wide[0] @ wide[1]),
        (d_x, wide[2] @ wide[1].T),
        (d_weight, np.einsum("BSD,BSF->DF", wide[0], wide[2])),
    ):
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=tolerance, atol=tolerance)
    # The weight's gradient is a float32 sum, never rounded to bfloat16.
    np.testing.assert_allclose(d_weight, np.einsum("BSD,BSF->DF", wide[0], wide[2]), rtol=1e-5, atol=1e-5)


def test_what_is_computed_apart_is_the_same():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.bfloat16)
    assert (jax.jit(transposed)(x) == x.T).all()
    cos, sin = jax.jit(lambda x: apart(lambda x: (jnp.cos(x), jnp.sin(x)), x))(x)
    np.testing.assert_allclose(cos.astype(jnp.float32), jnp.cos(x).astype(jnp.float32), rtol=1e-2)
    np.testing.assert_allclose(sin.astype(jnp.float32), jnp.sin(x).astype(jnp.float32), rtol=1e-2, atol=1e-2)
