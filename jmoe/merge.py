"""Averages the parameters of a run's checkpoints, which stands in for a decay of the learning rate.

    python -m jmoe.merge RUN STEP STEP ... --out OUT_RUN [--weights uniform|wsm-linear|wsm-1-sqrt|wsm-cosine|ema]

OUT_RUN is a run directory with the average as its one checkpoint, under the last of the steps, for eval.py and
`jmoe.load`; it holds no optimiser state, so that no training goes on from it. The state of routers, biases and
thresholds, is averaged as parameters are. Exit codes: 0 done, 1 a checkpoint cannot be used, 2 bad input.
"""

import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from jmoe import config, recipe
from jmoe.checkpoint import CheckpointError, Checkpoints
from jmoe.config import require
from jmoe.folder import check_new, new_folder
from jmoe.run_directory import RunDirectory
from jmoe.sharding import make_mesh
from jmoe.training import abstract_state

Rule = Literal["uniform", "wsm-linear", "wsm-1-sqrt", "wsm-cosine", "ema"]


@dataclass(frozen=True)
class Options:
    """Flags of this command."""

    out: str | None = None
    """the run directory to write; it must not be there yet, or be empty [path]"""
    weights: Rule = "wsm-1-sqrt"
    """uniform; those that emulate a decay of this shape from the first to the last of the steps (WSM, arXiv
    2507.17634); or an exponential moving average from the first to the last [name]"""
    ema_decay: float = 0.8
    """of ema: the weight of the average so far when the next checkpoint is taken in [share]"""

    def __post_init__(self):
        require(0.0 <= self.ema_decay < 1.0, f"ema_decay is {self.ema_decay}; it must lie in [0, 1)")


# ∫ from 0 to x of the learning rate over its peak, when the share x of the decay is over.
DECAYED = {
    "wsm-linear": lambda x: x - x * x / 2,
    "wsm-1-sqrt": lambda x: x - 2 / 3 * x**1.5,
    "wsm-cosine": lambda x: x / 2 + math.sin(math.pi * x) / (2 * math.pi),
}


def merge_weights(steps: Sequence[int], rule: Rule, ema_decay: float = 0.8) -> Float[np.ndarray, " n"]:
    """The weight of each checkpoint, float64 [n], for ascending steps; they sum to 1.

    With weights c the average is θ_0 + Σ w_i (θ_i − θ_{i−1}), where w_i = c_i + … + c_k: what was learnt between two
    checkpoints counts w_i times, as if the learning rate had been that share of what it was (WSM, arXiv 2507.17634,
    §3). Backwards: c_k = w_k, c_j = w_j − w_{j+1}, c_0 = 1 − w_1. Of the decay to be emulated w_i is the mean over the
    steps between the two, which need not be the same number for all.
    """
    n = len(steps)
    match rule:
        case "uniform":
            return np.full(n, 1 / n)
        case "ema":
            weights = (1 - ema_decay) * ema_decay ** np.arange(n - 1, -1, -1.0)
            weights[0] = ema_decay ** (n - 1)
            return weights
    over = [(step - steps[0]) / (steps[-1] - steps[0]) for step in steps]
    integral = np.array([DECAYED[rule](x) for x in over])
    shares = np.diff(integral) / np.diff(over)
    return -np.diff([1.0, *shares, 0.0])


def merge(run_dir: str | os.PathLike[str], steps: Sequence[int], options: Options) -> dict[int, float]:
    """Writes the average of a run's checkpoints to `options.out`, there in full or not at all; returns their weights.

    Sums are float64; one checkpoint is in memory at a time beside the sum, on the host.
    Raises InputError for steps or directories that cannot be, CheckpointError for a damaged checkpoint or a full disk.
    """
    run, out = RunDirectory(run_dir), Path(options.out or "")
    saved = run.read_config()
    require(saved is not None, f"{run_dir} is no run directory: it has no config.json")
    checkpoints = Checkpoints(run.checkpoints, keep=1)
    there = checkpoints.steps()
    told = f"{run_dir} has checkpoints of steps {', '.join(map(str, there)) or 'none'}"
    require(len(steps) >= 2, f"an average takes two or more steps, not {len(steps)}; {told}")
    require(list(steps) == sorted(set(steps)), f"steps {' '.join(map(str, steps))} must ascend, each named once")
    require(
        set(steps) <= set(there), f"there is no checkpoint of step {min(set(steps) - set(there), default=0)}; {told}"
    )
    require(options.out is not None, "--out is missing: the run directory to write")
    check_new(out)
    assert saved is not None
    settings = recipe.from_dict(saved)

    mesh = make_mesh(config.Mesh(), jax.local_devices(backend="cpu")[:1])
    shapes = abstract_state(settings, mesh).params
    total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), shapes)
    weights = merge_weights(steps, options.weights, options.ema_decay)
    for step, weight in zip(steps, weights, strict=True):
        restored = checkpoints.restore({"params": shapes}, step, read_only=True)
        assert restored is not None
        jax.tree.map(
            lambda so_far, x, w=weight: np.add(so_far, w * np.asarray(x, np.float64), so_far),
            total,
            restored[1]["params"],
        )
    params = jax.tree.map(lambda x, leaf: jax.device_put(x.astype(leaf.dtype), leaf.sharding), total, shapes)

    of_each = dict(zip(steps, weights.tolist(), strict=True))
    metadata = checkpoints.metadata(steps[-1])
    metadata["merged"] = {"run": str(run.path), "weights": {str(step): weight for step, weight in of_each.items()}}
    with new_folder(out) as folder:
        merged = RunDirectory(folder)
        written = Checkpoints(merged.checkpoints, keep=1)
        written.save(steps[-1], {"params": params}, metadata=metadata)
        written.close()
        merged.write_config(saved)
        shutil.copyfile(run.tokenizer, merged.tokenizer)
    return of_each


def main(argv: list[str]) -> int:
    named = list(takewhile(lambda argument: not argument.startswith("-"), argv))
    run, options = recipe.arguments(
        [*named[:1], *argv[len(named) :]],
        Options(),
        name="RUN STEP STEP ...",
        meaning="a run directory and checkpoints",
    )
    for step in named[1:]:
        require(step.isdecimal(), f"{step!r} is no step; after the run come the steps of its checkpoints, then flags")
    weights = merge(run, [int(step) for step in named[1:]], options)
    for step, weight in weights.items():
        print(f"step {step:>9}  weight {weight:.6f}")
    print(f"{options.weights} average of {len(weights)} checkpoints of {run}: {options.out}")
    return 0


if __name__ == "__main__":
    with recipe.exit_on_input_error():
        try:
            code = main(sys.argv[1:])
        except CheckpointError as error:
            sys.exit(f"error: {error}")
    sys.exit(code)
