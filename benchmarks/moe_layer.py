"""What the MoE layer costs, against a dense SwiGLU of the same active FLOPs and against itself.

    JAX_PLATFORMS=cpu python -m benchmarks.moe_layer [--only a b c d f] [--json PATH]

Times are of the forward and backward pass, with the gradients of tokens, combine weights and experts' weights. Routing
is drawn at random, uniform over the experts; weights are float32, as in training, whatever the layer computes in.
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Figure, Times, measure, median, ratio, report
from jmoe import config
from jmoe.allocator import keep_freed_memory
from jmoe.model.expert_parallel import local_experts
from jmoe.model.experts import Experts
from jmoe.ops.permute import plan, sum_slots

D = F = 512
MODEL = config.Model(d_model=D)


def step(function: Callable[..., Any], *arguments: Any, d_out: jax.Array) -> Any:
    """The compiled forward and backward pass of `function` at these arguments."""

    def both(arguments, d_out):
        out, pullback = jax.vjp(function, *arguments)
        return out, pullback(d_out)

    compiled = jax.jit(both).lower(arguments, d_out).compile()
    return compiled, lambda: compiled(arguments, d_out)


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def routing(tokens: int, experts: int, mean: float, slots: int) -> tuple[jax.Array, jax.Array]:
    """Distinct random experts for each token, `mean` of them on average, and their weights; other slots are empty."""
    rng = np.random.default_rng(0)
    ids = rng.random((tokens, experts)).argsort(1)[:, :slots]
    # One expert or more, as a nucleus has; a binomial number of the others.
    used = 1 + rng.binomial(slots - 1, (mean - 1) / (slots - 1), (tokens, 1)) if mean < slots else slots
    ids = np.where(np.arange(slots) < used, ids, experts).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(rng.random((tokens, slots)), jnp.float32)


def moe(
    tokens: int, expert_ids: jax.Array, combine_weights: jax.Array, dtype: Any = jnp.float32, **settings: Any
) -> Any:
    """The layer's own computation on one device, with experts made as the model makes them."""
    moe_config = config.MoE(d_ff=F, router=config.TopK(1), **settings)
    buckets = Experts(moe_config, MODEL, jax.random.key(0)).weights()
    x, d_out = normal(tokens, D, dtype=dtype), normal(tokens, D, dtype=dtype)
    return step(lambda x, w, b: local_experts(x, expert_ids, w, b), x, combine_weights, buckets, d_out=d_out)


def dense(tokens: int, width: int, dtype: Any) -> Any:
    """The arithmetic of the model's dense feed-forward, on [T, D] so that all its products are of matrices."""

    def product(x, weight):
        return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)

    def layer(x, gate, up, down):
        return product(jax.nn.silu(product(x, gate)) * product(x, up), down)

    x, wide = normal(tokens, D, dtype=dtype), normal(D, width) * MODEL.init_std
    return step(layer, x, wide, wide, wide.T, d_out=x)


def ragged_dot(tokens: int, expert_ids: jax.Array, combine_weights: jax.Array, experts: int, dtype: Any) -> Any:
    """The layer as JAX itself offers it."""

    def layer(x, combine_weights, bucket):
        order, inverse, used, sizes = plan(expert_ids, experts)
        gate, up, down = (w.astype(dtype) for w in bucket)
        rows = x[order // expert_ids.shape[1]]
        hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
        out = combine_weights.reshape(-1)[order][:, None] * jax.lax.ragged_dot(hidden, down, sizes)
        return sum_slots(out.astype(dtype), inverse, used)

    (bucket,) = Experts(config.MoE(experts, F, router=config.TopK(1)), MODEL, jax.random.key(0)).weights()
    x, d_out = normal(tokens, D, dtype=dtype), normal(tokens, D, dtype=dtype)
    return step(layer, x, combine_weights, bucket, d_out=d_out)


def one_wide_expert(tokens: int, width: int, dtype: Any) -> Any:
    """The same dense feed-forward as one expert that every token goes to: the fastest dense one known here."""
    weights = Experts(config.MoE(1, width, router=config.TopK(1)), MODEL, jax.random.key(0)).weights()
    x, combine_weights = normal(tokens, D, dtype=dtype), jnp.ones((tokens, 1))
    expert_ids = jnp.zeros((tokens, 1), jnp.int32)
    return step(lambda x, w, b: local_experts(x, expert_ids, w, b), x, combine_weights, weights, d_out=x)


def milliseconds(times: Times, names: dict[str, str]) -> list[Figure]:
    return [Figure(label, 1e3 * median(times, name), "ms") for name, label in names.items()]


def against_dense() -> list[Figure]:
    T, E, k, figures = 4096, 16, 2, []
    ids, weights = routing(T, E, k, k)
    for dtype, limit in (("float32", 1.15), ("bfloat16", 1.25)):
        programs = {
            "layer": moe(T, ids, weights, dtype, num_experts=E)[1],
            "dense": dense(T, k * F, dtype)[1],
            "one expert": one_wide_expert(T, k * F, dtype)[1],
        }
        times = measure(programs, rounds=15)
        slow = measure({"layer": programs["layer"], "ragged": ragged_dot(T, ids, weights, E, dtype)[1]}, rounds=3)
        names = {"layer": "layer", "dense": "dense SwiGLU", "one expert": "one wide expert on every token"}
        figures += [
            Figure(f"a. {dtype}: layer / dense", ratio(times, "layer", "dense"), "x", "at most", limit),
            Figure(f"a. {dtype}: layer / one wide expert", ratio(times, "layer", "one expert")),
            Figure(f"a. {dtype}: lax.ragged_dot / layer", ratio(slow, "ragged", "layer"), "x", "at least", 8),
            *milliseconds(times, {name: f"a. {dtype}: {label}" for name, label in names.items()}),
        ]
    return figures


def number_of_experts() -> list[Figure]:
    counts, k, T = (8, 16, 32, 64), 2, 8192
    programs = {str(E): moe(T, *routing(T, E, k, k), num_experts=E)[1] for E in counts}
    times = measure(programs, rounds=9)
    return [
        Figure("b. 64 experts / 8 experts", ratio(times, "64", "8"), "x", "at most", 1.25),
        *milliseconds(times, {name: f"b. {name} experts" for name in programs}),
    ]


def nucleus() -> list[Figure]:
    T, E, slots = 4096, 16, 7
    programs = {str(mean): moe(T, *routing(T, E, mean, slots), num_experts=E)[1] for mean in (1.5, 3.0)}
    times = measure(programs, rounds=11)
    return [
        Figure("c. 1.5 experts per token / 3", ratio(times, "1.5", "3.0"), "x", "at most", 0.6),
        *milliseconds(times, {name: f"c. {name} experts per token, of {slots} slots" for name in programs}),
    ]


def widths() -> list[Figure]:
    T, E, k, figures = 4096, 16, 2, []
    ids, weights = routing(T, E, k, k)
    rows = np.bincount(np.asarray(ids).reshape(-1), minlength=E)
    compiled, programs, active = {}, {}, {}
    for name in ("equal", "arithmetic", "hybrid"):
        start = time.perf_counter()
        compiled[name], programs[name] = moe(T, ids, weights, num_experts=E, widths=name)
        figures.append(Figure(f"d. {name}: compile time", time.perf_counter() - start, "s"))
        active[name] = float(rows @ config.MoE(E, F, widths=name, router=config.TopK(k)).expert_widths)
    times = measure(programs, rounds=11)
    memory = {name: peak_bytes(program) for name, program in compiled.items()}
    for name in ("arithmetic", "hybrid"):
        per_parameter = ratio(times, name, "equal") * active["equal"] / active[name]
        figures += [
            Figure(f"d. {name} / equal widths, per activated parameter", per_parameter, "x", "at most", 1.15),
            Figure(f"d. {name} / equal widths, peak memory", memory[name] / memory["equal"], "x", "at most", 1.5),
        ]
    return figures + milliseconds(times, {name: f"d. {name}" for name in programs})


def peak_bytes(compiled: Any) -> int:
    """What a program holds at its peak, its arguments and results included."""
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes


def permutation() -> list[Figure]:
    T, E, k = 4096, 16, 2
    ids, weights = routing(T, E, k, k)
    start = time.perf_counter()
    compiled, layer = moe(T, ids, weights, num_experts=E)
    seconds = time.perf_counter() - start

    def pieces(x, ids, weights, rows, d_out):
        """What the layer does beside its experts: sort, gather tokens and gradients, combine, sum gradients."""
        order, inverse, used, sizes = plan(ids, E)
        token, weight = order // k, weights.reshape(-1)[order]
        gathered = x[token], x[token], d_out[token]
        sums = jnp.zeros(x.shape).at[token].add(rows), sum_slots(rows, inverse, used)
        return gathered, sums, weight, sizes, weight[inverse]

    x, rows, jitted = normal(T, D), normal(T * k, D), jax.jit(pieces)
    times = measure({"layer": layer, "pieces": lambda: jitted(x, ids, weights, rows, x)}, rounds=15)
    backward = [line for line in compiled.as_text().splitlines() if "transpose(jvp" in line]
    scatters = [line for line in backward if re.search(r"= (f32|bf16)\[.*scatter", line)]
    memory = compiled.memory_analysis()
    return [
        Figure("f. sort, permute, combine / layer", ratio(times, "pieces", "layer"), "x", "at most", 0.1),
        Figure("f. scatters of floats in the compiled backward pass", len(scatters), "", "at most", 0),
        Figure("f. peak memory: arguments", memory.argument_size_in_bytes / 2**20, "MiB"),
        Figure("f. peak memory: results", memory.output_size_in_bytes / 2**20, "MiB"),
        Figure("f. peak memory: temporary", memory.temp_size_in_bytes / 2**20, "MiB"),
        Figure("f. compile time", seconds, "s"),
        *milliseconds(times, {"layer": "f. layer", "pieces": "f. sort, permute, combine"}),
    ]


BENCHMARKS = {"a": against_dense, "b": number_of_experts, "c": nucleus, "d": widths, "f": permutation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="parts to run")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    keep_freed_memory()  # as train.py does
    figures = [figure for name in arguments.only for figure in BENCHMARKS[name]()]
    report(f"MoE layer, forward + backward, d = f = {D}", figures, arguments.json)


if __name__ == "__main__":
    main()
