"""The TPU kernels, interpreted on CPU, against the implementation for the other platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import splash_attention
from jmoe.ops.attention import attention
from jmoe.ops.splash_attention import backward, forward, kernel_flops, supports


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "dtype", "tolerance"),
    [(2, 2, 128, "float32", 1e-5), (4, 2, 64, "float32", 1e-5), (2, 1, 128, "bfloat16", 2e-2)],
)
def test_values_and_gradients(heads, kv_heads, width, dtype, tolerance, monkeypatch):
    """Two rows of documents that span, end at and begin at the bounds of two blocks; one ends in padding."""
    monkeypatch.setattr(splash_attention, "BLOCK", 128)
    length = 256
    lengths = ([100, 56, 100], [128, 90, 38])
    segments = np.stack([np.repeat(np.arange(3) + 1, row) for row in lengths]).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths]).astype(np.int32)
    segments[1, 218:], positions[1, 218:] = 0, 0
    segments, positions = jnp.asarray(segments), jnp.asarray(positions)
    rng = np.random.default_rng(0)
    q, d_out = (jnp.asarray(rng.normal(size=(2, length, heads, width)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, length, kv_heads, width)), dtype) for _ in range(2))
    # Padding bears no loss, and what it attends to differs.
    d_out = jnp.where((segments > 0)[..., None, None], d_out, 0)

    out, pullback = jax.vjp(lambda *qkv: attention(*qkv, segments, segments, positions, positions), q, k, v)
    expected = [jnp.where((segments > 0)[..., None, None], out, 0), *pullback(d_out)]
    splash_out, log_partition = forward(q, k, v, segments, interpret=True)
    got = [jnp.where((segments > 0)[..., None, None], splash_out, 0)]
    got += backward(q, k, v, segments, splash_out, log_partition, d_out, interpret=True)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == jnp.dtype(dtype)
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * jnp.abs(other).max())


def test_rows_that_do_not_divide_into_blocks():
    assert supports(384) and not supports(200)
    assert splash_attention._block(384) == 384 and splash_attention._block(640) == 128


def test_flops_are_those_of_the_blocks_visited():
    """Eight blocks of 512: 36 of 64 are visited, two products forward, seven backward."""
    operands = [("s8", (8, 8)), *[("bf16", (3, 16, 4096, 128))] * 3]
    of_one_product = 2 * 3 * 16 * 4096 * 4096 * 128 * 36 / 64
    assert kernel_flops("splash_mha_fwd_segmented_residuals", operands) == 2 * of_one_product
    backward = kernel_flops("splash_mha_dkv", operands) + kernel_flops("splash_mha_dq", operands)
    assert backward == 7 * of_one_product
