"""What every benchmark does: programs take turns, round by round, and their figures are printed beside the targets.

The clock of a shared machine drifts by tens of percent within minutes, so that only ratios between programs which took
turns in one process mean something. `measure` takes the turns, `ratio` compares within each round.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax

Times = dict[str, list[float]]
"""Seconds that each program took, by round."""


def measure(programs: Mapping[str, Callable[[], Any]], rounds: int = 9, warm_up: int = 1) -> Times:
    """Runs the programs in turns until each has run `rounds` times, and waits for what each returns.

    The order is turned round every other round, so that none always follows the same one. The first `warm_up` rounds,
    in which programs compile, are not counted.
    """
    times: Times = {name: [] for name in programs}
    for round in range(-warm_up, rounds):
        for name in list(programs)[:: 1 if round % 2 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(programs[name]())
            if round >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def median(times: Times, name: str) -> float:
    """Seconds of a program, the median over the rounds."""
    return statistics.median(times[name])


def ratio(times: Times, name: str, reference: str) -> float:
    """Time of a program over that of another: the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


@dataclass(frozen=True)
class Figure:
    """One line of a report."""

    name: str
    """what was measured"""
    value: float
    unit: str = "x"
    bound: Literal["at most", "at least", ""] = ""
    """which side of the target is good; empty for a figure without a target"""
    target: float = 0.0

    @property
    def met(self) -> bool:
        """Whether the value is on the good side of the target, or has none."""
        return {"at most": self.value <= self.target, "at least": self.value >= self.target, "": True}[self.bound]


def report(title: str, figures: Sequence[Figure], path: Path | None = None) -> None:
    """Prints the figures as a table; writes them to `path` as JSON, with what they were measured on, if it is given."""
    width = max(len(figure.name) for figure in figures)
    print(f"\n{title}")
    for figure in figures:
        line = f"  {figure.name:<{width}}  {figure.value:>10.3f} {figure.unit:<8}"
        if figure.bound:
            line += f"  {figure.bound} {figure.target:g}{'' if figure.met else '  MISSED'}"
        print(line.rstrip())
    if path:
        measured = {
            "title": title,
            "platform": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "python": sys.version.split()[0],
            "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
        }
        path.write_text(json.dumps(measured, indent=2) + "\n")
