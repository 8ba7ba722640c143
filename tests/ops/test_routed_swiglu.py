"""Both implementations against a loop over experts: values and every gradient."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import routed_swiglu as module
from jmoe.ops.permute import plan
from jmoe.ops.routed_swiglu import ExpertWeights, routed_swiglu

T, D = 37, 8
EQUAL, THREE_WIDTHS = ((5, 12),), ((2, 4), (1, 8), (2, 12))  # experts and width of each bucket; five experts in all
SILENT = 3  # a token without experts, whose features and gradient are NaN


def random_ids(slots):
    return np.random.default_rng(1).integers(0, 6, (T, slots)).astype(np.int32)  # 5: no expert


ROUTINGS = {
    "random, with empty slots": random_ids(3),
    "one slot": random_ids(1),
    "empty experts": random_ids(2) // 2 * 2 + 1,
    "all to one": np.full((T, 1), 3, np.int32),
    "no expert at all": np.full((T, 2), 5, np.int32),
    "one token": np.array([[4, 5, 0]], np.int32),
}


@pytest.fixture(params=["blocked", "grouped"])
def implementation(request, monkeypatch):
    """On CPU the blocked one would be chosen. Small blocks, so that each of the loops over them runs."""
    monkeypatch.setattr(module, "BLOCKS", (2, 5, 8))
    for direction in ("forward", "backward"):
        monkeypatch.setattr(module, f"_blocked_{direction}", getattr(module, f"_{request.param}_{direction}"))


def loop(tokens, combine_weights, expert_ids, buckets):
    """Every expert on every token that was sent to it, in float32: the definition."""
    experts = [ExpertWeights(*w) for bucket in buckets for w in zip(*bucket, strict=True)]
    out = jnp.zeros(tokens.shape, jnp.float32)
    for e, expert in enumerate(experts):
        gate, up, down = (w.astype(jnp.float32) for w in expert)
        weight = jnp.where(expert_ids == e, combine_weights, 0).sum(1, keepdims=True)
        x = jnp.where((expert_ids == e).any(1, keepdims=True), tokens, 0).astype(jnp.float32)
        out += weight * ((jax.nn.silu(x @ gate) * (x @ up)) @ down)
    return out


def inputs(shape, expert_ids, dtype, weight_dtype):
    rng = np.random.default_rng(0)
    normal = lambda *shape, dtype=dtype: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    matrix = partial(normal, dtype=weight_dtype)
    tokens, d_out = normal(len(expert_ids), D), normal(len(expert_ids), D)
    if len(expert_ids) > SILENT and (expert_ids[SILENT] == 5).all():
        tokens, d_out = tokens.at[SILENT].set(jnp.nan), d_out.at[SILENT].set(jnp.nan)
    combine_weights = jnp.asarray(rng.random(expert_ids.shape), jnp.float32)
    buckets = tuple(ExpertWeights(matrix(E, D, F), matrix(E, D, F), matrix(E, F, D)) for E, F in shape)
    return tokens, combine_weights, buckets, d_out


def check(shape, expert_ids, dtype, weight_dtype, tolerance):
    if expert_ids.shape[1] > 1 and len(expert_ids) > SILENT:
        expert_ids = expert_ids.copy()
        expert_ids[SILENT] = 5
    *arguments, d_out = inputs(shape, expert_ids, dtype, weight_dtype)
    ids = jnp.asarray(expert_ids)

    @jax.jit
    def run(tokens, combine_weights, buckets, d_out):
        out, pullback = jax.vjp(lambda t, w, b: routed_swiglu(t, w, plan(ids, 5), b), tokens, combine_weights, buckets)
        return out, pullback(d_out)

    @jax.jit
    def expected(tokens, combine_weights, buckets, d_out):
        out, pullback = jax.vjp(lambda t, w, b: loop(t, w, ids, b), tokens, combine_weights, buckets)
        silent = (ids == 5).all(1, keepdims=True)
        return out, pullback(jnp.where(silent, 0, d_out.astype(jnp.float32)))

    def compare(path, got, want):
        assert got.shape == want.shape and got.dtype == want.dtype, path
        want = np.asarray(want, np.float32)
        scale = tolerance * max(1.0, np.abs(want).max(initial=0))
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=scale, rtol=0, err_msg=str(path))

    out, gradients = run(*arguments, d_out)
    want, want_gradients = expected(*arguments, d_out)
    compare("out", out, want.astype(dtype))
    jax.tree_util.tree_map_with_path(compare, gradients, want_gradients)


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_values_and_gradients_match_the_loop(implementation, routing):
    check(THREE_WIDTHS, routing, "float32", "float32", 1e-5)


@pytest.mark.parametrize(
    "shape, dtype, weight_dtype, tolerance",
    [
        (EQUAL, "float32", "float32", 1e-5),
        (THREE_WIDTHS, "bfloat16", "bfloat16", 2e-2),
        (THREE_WIDTHS, "bfloat16", "float32", 2e-2),
    ],
)
def test_equal_widths_and_bfloat16(implementation, shape, dtype, weight_dtype, tolerance):
    check(shape, ROUTINGS["random, with empty slots"], dtype, weight_dtype, tolerance)


def test_the_platform_of_the_program_chooses_and_no_gradient_is_scatter_added():
    """Lowered for CPU the program holds loops of blocks; lowered for CUDA, from the same host, ragged products."""
    expert_ids = jnp.asarray(random_ids(3))
    *arguments, _ = inputs(THREE_WIDTHS, np.asarray(expert_ids), "float32", "float32")
    out, pullback = jax.vjp(lambda t, w, b: routed_swiglu(t, w, plan(expert_ids, 5), b), *arguments)
    traced = jax.jit(pullback).trace(out)
    assert "while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "while" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(r"f32\[\d+,[0-9,]*\] = scatter-add", str(traced.jaxpr))
