"""What Muon costs on a CPU, beside AdamW: whole steps over batch sizes, its own time over its products', its state.

    python -m benchmarks.optimizer [--only float32] [--tokens 4096 32768] [--rounds 3] [--json FILE]

The model is the mixture of benchmarks.train_step, in micro-batches of 8 rows of 512 tokens; Muon iterates in bfloat16
(float32 too where its own time is measured). What an optimiser takes does not depend on the batch, so that its share of
a step falls as the batch grows. Muon's own time is that of momentum and iteration of its 424 matrices; its floor is the
time of the iteration's products alone, with nothing to add or transpose between them.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.timing import Figure, measure, median, ratio, report
from benchmarks.train_step import BATCH, LENGTH, OURS, our_step, settings
from jmoe import config, optim, training
from jmoe.allocator import keep_freed_memory
from jmoe.optim.muon import scale_by_muon
from jmoe.optim.roles import by_path, is_matrix, sides
from jmoe.sharding import is_variable, logical_axes

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
OPTIMISERS: dict[str, config.Optimiser] = {"AdamW": config.AdamW(), "Muon": config.Muon()}


def steps(dtype: Dtype, tokens: int, rounds: int) -> list[Figure]:
    """Whole train steps of a batch."""
    model, micro_batches = settings(OURS["MoE"], dtype), tokens // (BATCH * LENGTH)
    programs = {
        name: our_step(
            dataclasses.replace(model, optim=rule, batch_size=BATCH * micro_batches, accumulation=micro_batches)
        )
        for name, rule in OPTIMISERS.items()
    }
    times = measure(programs, rounds)
    title, target = f"{dtype}, {tokens:,} tokens a step", tokens >= 32768
    return [
        *(Figure(f"{title}: {name}", median(times, name), "s") for name in programs),
        Figure(
            f"{title}: Muon / AdamW", ratio(times, "Muon", "AdamW"), "x", "at most" if target else "", 1.10 * target
        ),
    ]


def matrices() -> dict[str, Any]:
    """The model's matrices that Muon owns, by name."""
    params = by_path(training.init_state(settings(OURS["MoE"], "float32")).params)
    return {path: v for path, v in params.items() if is_matrix(config.Muon(), logical_axes(v))}


def products(dtype: str, parameter: Any) -> jax.Array:
    """Those of the iteration on a parameter's matrices, one matrix after another, each of what the one before gave."""
    small, large = sorted(sides(logical_axes(parameter), "together").sizes(parameter.shape))

    def product(a, b):
        return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype)

    def step(wide, _):
        gram = product(wide, wide.reshape(large, small))
        return product(product(gram, gram), wide), None

    matrices = parameter[...].astype(dtype).reshape(-1, small, large)
    return lax.map(lambda wide: lax.scan(step, wide, length=config.Muon().iterations)[0], matrices)


def own_time(rounds: int) -> list[Figure]:
    """Muon's direction for its matrices, over its products."""
    params = matrices()
    programs: dict[str, Callable[[], Any]] = {}
    for dtype in DTYPES:
        rule = scale_by_muon(config.Muon(iteration_dtype=dtype))
        state, update = rule.init(params), jax.jit(rule.update)

        def floor(params, dtype=dtype):
            return {path: products(dtype, v) for path, v in params.items()}

        programs[dtype] = partial(update, params, state)
        programs[f"{dtype} floor"] = partial(jax.jit(floor), params)
    times = measure(programs, rounds)
    figures = []
    for dtype in DTYPES:
        figures.append(Figure(f"Muon's own time, iterating in {dtype}", median(times, dtype), "s"))
        over = ratio(times, dtype, f"{dtype} floor")
        figures.append(Figure(f"Muon's own time / its products, in {dtype}", over, "x", "at most", 1.3))
    return figures


def state_bytes(rule: config.Optimiser) -> int:
    """Of an optimiser, for the matrices that Muon owns."""
    state = jax.eval_shape(optim.transformation(rule).init, matrices())
    return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(state, is_leaf=is_variable) if is_variable(v))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=DTYPES, help="arithmetic of the model")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192, 16384, 32768], help="of a step")
    parser.add_argument("--steps-only", action="store_true", help="leave Muon's own time out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_freed_memory()  # as train.py does
    over = state_bytes(config.Muon()) / state_bytes(config.AdamW())
    figures = [Figure("Muon's state / AdamW's, for the matrices", over, "x", "at most", 0.55)]
    if not args.steps_only:
        figures += own_time(args.rounds)
    for dtype in DTYPES:
        if args.only in (None, dtype):
            for tokens in args.tokens:
                figures += steps(dtype, tokens, args.rounds)
    report("optimiser", figures, args.json)


if __name__ == "__main__":
    main()
