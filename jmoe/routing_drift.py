"""How routing changes over a run's checkpoints: `python -m jmoe.routing_drift RUN_DIR [--flag value ...]`.

Every checkpoint routes the same held-out tokens. Prints a table and writes drift.json and drift.png to the run
directory. Exit codes as those of eval.py.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import jmoe
from jmoe import recipe
from jmoe.checkpoint import CheckpointError, Checkpoints
from jmoe.config import InputError, require
from jmoe.convert.held_out import batches_of
from jmoe.data.prepare import prepare_held_out
from jmoe.evaluation import routing_drift
from jmoe.evaluation.routing_drift import Drift, chosen_experts, drift_table, expert_similarity, plot_drift
from jmoe.run_directory import RunDirectory, write_json


@dataclass(frozen=True)
class Options:
    """Flags of this command."""

    steps: tuple[int, ...] | None = None
    """the checkpoints, the last of which is what the others are compared with; all if None [steps]"""
    data: str | None = None
    """other text than the run's own held-out one: a pattern of .txt and .jsonl files, each also .gz or .zst [path]"""
    tokens: int = 16384
    """about so many are routed [tokens]"""
    settled: float = routing_drift.SETTLED
    """routing has settled from where on neighbouring checkpoints agree on this share of the choices [fraction]"""

    def __post_init__(self):
        require(self.tokens >= 1, f"tokens is {self.tokens}; it must be at least 1")
        require(0.0 < self.settled <= 1.0, f"settled is {self.settled}; it must lie in (0, 1]")


def main(argv: list[str]) -> None:
    run_dir, options = recipe.arguments(argv, Options(), name="RUN_DIR", meaning="the directory of a run")
    run = RunDirectory(Path(run_dir))
    saved = Checkpoints(run.checkpoints, keep=1).steps()
    steps = saved if options.steps is None else sorted(set(options.steps))
    if missing := set(steps) - set(saved):
        raise InputError(f"{run_dir} has no checkpoint of step {min(missing)}; complete steps are {saved}")
    last = jmoe.load(run_dir, step=steps[-1] if steps else None)
    require(
        len(steps) > 1,
        f"{run_dir} has one checkpoint, and a change takes two; train with checkpoint.keep_every to keep more",
    )
    batches = batches_of(prepare_held_out(last.settings.data, last.tokenizer, options.data), options.tokens)
    final = chosen_experts(last.params, last.settings.model, batches)
    require(bool(final), f"{run_dir} is dense: it has no mixture of experts")

    layers, before = list(final), None
    rows_of = {name: [] for name in ("saturation", "with_next", "by_chance", "similarity")}
    for step in steps:
        model = last if step == steps[-1] else jmoe.load(run_dir, step=step)
        now = final if step == steps[-1] else chosen_experts(model.params, model.settings.model, batches)
        similarity = expert_similarity(model.params, model.settings.model)
        rows_of["saturation"].append([routing_drift.overlap(now[i], final[i]) for i in layers])
        rows_of["by_chance"].append([routing_drift.chance(now[i], final[i]) for i in layers])
        rows_of["similarity"].append([similarity[i] for i in layers])
        if before is not None:
            rows_of["with_next"].append([routing_drift.overlap(before[i], now[i]) for i in layers])
        before = now
    rows_of["with_next"].append([float("nan")] * len(layers))
    drift = Drift(steps, layers, **{name: np.array(table) for name, table in rows_of.items()})
    print(f"{run_dir}, {len(next(iter(final.values()))):,} tokens of {options.data or 'the held-out text'}")
    print(drift_table(drift, options.settled))
    try:
        write_json(run.path / "drift.json", {"data": options.data, **drift.as_json(options.settled)})
        plot_drift(drift, Path(run.path) / "drift.png", options.settled)
    except OSError as error:
        raise InputError(f"{run_dir} cannot be written to: {error.strerror}") from error


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    with recipe.exit_on_input_error():
        try:
            main(sys.argv[1:])
        except CheckpointError as error:
            sys.exit(f"error: {error}")
