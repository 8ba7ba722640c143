"""One suite for every implementation, against a loop over groups."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jmoe.ops import grouped_matmul as module
from jmoe.ops.grouped_matmul import blocked, grouped_matmul, megablox, ragged_dot

# As many groups in every case, so that they share a program.
GROUP_SIZES = {
    "even": [60, 60, 60, 60, 60],
    "uneven": [1, 130, 0, 129, 40],
    "first and last empty": [0, 200, 0, 99, 0],
    "at the tiles' edges": [128, 0, 128, 0, 44],
    "all rows to one": [0, 300, 0, 0, 0],
    "one row": [0, 0, 0, 1, 0],
    "no row": [0, 0, 0, 0, 0],
    "rows left over": [17, 0, 128, 60, 3],
}


@pytest.fixture(params=[blocked, megablox, ragged_dot], ids=lambda module: module.__name__.rpartition(".")[2])
def implementation(request):
    return request.param


@functools.cache
def program(implementation, dtype, rows=300, D=24, widths=(40,), ends=(5,)):
    """Compiled for the shapes beside it: out, d_rows and d_weights of each bucket of groups, which end at `ends`."""
    starts = (0, *ends[:-1])

    def run(group_sizes, buckets):
        results = []
        for start, (rows, weights, d_out) in zip(starts, buckets, strict=True):
            out, pullback = jax.vjp(lambda r, w, start=start: grouped_matmul(r, w, group_sizes, start), rows, weights)
            results.append((out, *pullback(d_out)))
        return results

    def shape(*axes):
        return jax.ShapeDtypeStruct(axes, jnp.dtype(dtype))

    buckets = [
        (shape(rows, D), shape(end - start, D, F), shape(rows, F))
        for start, end, F in zip(starts, ends, widths, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(module, "IMPLEMENTATIONS", {"default": implementation})
        if implementation is megablox:  # Simulates a TPU's memory, which holds NaN where nothing was written.
            stack.enter_context(pltpu.force_tpu_interpret_mode())
        return jax.jit(run).lower(jax.ShapeDtypeStruct(ends[-1:], jnp.int32), buckets).compile(), buckets


def loop(rows, weights, d_out, sizes, start):
    """The definition, in float64 NumPy: out, d_rows, d_weights of a bucket whose first row is `start`."""
    rows, weights, d_out = (np.asarray(array, np.float64) for array in (rows, weights, d_out))
    out, d_rows, d_weights = np.zeros(d_out.shape), np.zeros(rows.shape), np.zeros(weights.shape)
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        out[own] = rows[own] @ weights[e]
        d_rows[own] = d_out[own] @ weights[e].T
        d_weights[e] = rows[own].T @ d_out[own]
        start += size
    return out, d_rows, d_weights


def check(run, shapes, sizes):
    """Compares every result with the loop's. Rows outside a bucket are NaN, which may reach nothing."""
    rng = np.random.default_rng(0)
    buckets = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    expected, rest, start = [], sizes, 0
    for rows, weights, d_out in buckets:
        own, rest = rest[: len(weights)], rest[len(weights) :]
        end = start + sum(own)
        for array in (rows, d_out):
            array[:start], array[end:] = np.nan, np.nan
        expected.append(loop(rows, weights, d_out, own, start))
        start = end
    results = run(np.array(sizes, np.int32), buckets)
    for (rows, *_), got, want in zip(buckets, results, expected, strict=True):
        for name, value, target in zip(("out", "d_rows", "d_weights"), got, want, strict=True):
            assert value.dtype == rows.dtype, name
            tolerance = (1e-5 if rows.dtype == np.float32 else 1e-2) * max(1.0, np.abs(target).max(initial=0))
            value = np.asarray(value, np.float64)
            np.testing.assert_allclose(value, target, rtol=0, atol=tolerance, err_msg=name)
            assert not value[target == 0].any(), f"{name} is not exactly zero where it must be"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES.keys())
def test_values_and_gradients_match_the_loop(implementation, sizes, dtype):
    check(*program(implementation, dtype), sizes)


@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES.keys())
def test_buckets_of_groups_have_widths_of_their_own(implementation, sizes):
    """Together they are all groups; rows of other buckets give zeros and take no gradient."""
    check(*program(implementation, "float32", widths=(8, 40, 24), ends=(1, 4, 5)), sizes)


def test_no_rows(implementation):
    check(*program(implementation, "float32", rows=0), [0] * 5)


def test_megablox_with_several_tiles_in_every_direction(monkeypatch):
    """D and F that no tile divides; the rest of a tile is masked."""
    for kernel in ("GMM", "TGMM"):
        monkeypatch.setattr(megablox, kernel, (*getattr(megablox, kernel)[:2], 4 * 128))
    monkeypatch.setattr(megablox, "COLUMNS", 128)
    check(*program(megablox, "float32", D=200, widths=(300,), ends=(4,)), [40, 0, 200, 60])


def test_megablox_tiles():
    def tiles(kernel, rows, groups, contraction, columns, dtype="bfloat16"):
        rows = jax.ShapeDtypeStruct((rows, contraction), jnp.dtype(dtype))
        return megablox._tiles(kernel, rows, jax.ShapeDtypeStruct((groups,), jnp.int32), contraction, columns)

    assert tiles(megablox.GMM, 131072, 64, 2048, 1024) == (128, 2048, 1024)
    assert tiles(megablox.TGMM, 131072, 64, 2048, 1024) == (256, 1024, 1024)
    assert tiles(megablox.GMM, 65536, 8, 2048, 1025, "float32") == (256, 1024, 640)
    assert tiles(megablox.TGMM, 65536, 8, 1536, 100) == (512, 768, 100)
    assert tiles(megablox.GMM, 20, 4, 37, 37) == (32, 37, 37)


def test_flops_are_those_of_the_tiles_visited():
    """1024 rows of 4 groups in 8 tiles: three tiles may be shared by two groups."""
    numbers = [("s32", ()), ("s32", (5,)), ("s32", (11,)), ("s32", (11,)), ("s32", (1,))]
    of_tiles = 11 * 128 * 2 * 64 * 32
    assert megablox.kernel_flops("gmm", [*numbers, ("bf16", (1024, 64)), ("bf16", (4, 64, 32))]) == of_tiles
    assert megablox.kernel_flops("gmm", [*numbers, ("bf16", (1024, 32)), ("bf16", (4, 64, 32))]) == of_tiles
    for lhs in ((1024, 64), (64, 1024)):
        assert megablox.kernel_flops("tgmm", [*numbers, ("bf16", lhs), ("bf16", (1024, 32))]) == of_tiles


def test_first_group_must_leave_groups_for_the_weights():
    rows, weights, sizes = jnp.ones((4, 2)), jnp.ones((2, 2, 3)), jnp.array([1, 1, 2])
    for first_group in (-1, 2):
        with pytest.raises(ValueError, match=f"weights of 2 groups from group {first_group} on, but there are 3"):
            grouped_matmul(rows, weights, sizes, first_group)


def test_the_platform_of_the_program_chooses():
    """From one host: for CPU the blocked loop, for TPU a Pallas kernel, elsewhere XLA's ragged dot."""
    shapes = (
        jax.ShapeDtypeStruct((8, 4), jnp.float32),
        jax.ShapeDtypeStruct((2, 4, 4), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    )
    traced = jax.jit(grouped_matmul).trace(*shapes)
    cpu, tpu, cuda = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu", "cuda"))
    marks = ("stablehlo.while", "tpu_custom_call", "chlo.ragged_dot")
    assert [[mark in text for mark in marks] for text in (cpu, tpu, cuda)] == [
        [True, False, False],
        [True, True, False],
        [False, False, True],
    ]
