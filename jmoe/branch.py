"""Runs that branch from the stable phase of another, to let the learning rate decay (arXiv 2404.06395, 2405.18392).

`Config.decay_from` = RUN@STEP says where from. The branch goes on from that checkpoint exactly, parameters, optimiser
state, counters and place in the data, but for its learning rate, which decays from STEP to the branch's end.
"""

import dataclasses
from typing import Any, NamedTuple

from jmoe import recipe
from jmoe.checkpoint import Checkpoints
from jmoe.config import WSD, Config, Constant, Cosine, InputError, require
from jmoe.run_directory import FREE, LEARNING_RATE, RunDirectory, changes
from jmoe.storage import same_place


class Origin(NamedTuple):
    """Where a run branches from."""

    run: RunDirectory
    step: int

    @classmethod
    def of(cls, settings: Config) -> "Origin | None":
        """None for a run that is no branch."""
        if settings.decay_from is None:
            return None
        path, _, step = settings.decay_from.rpartition("@")
        return cls(RunDirectory(path), int(step))

    def restore(self, items: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """The checkpoint, as `Checkpoints.restore` has it; the run is left as it is."""
        return Checkpoints(self.run.checkpoints, keep=1).restore(items, self.step, read_only=True)


def resolve(settings: Config) -> Config:
    """The configuration with the schedule of a branch, whose decay begins where it branches: a constant one becomes
    WSD, whose shape and final value WSD may also give. Runs that are no branch stay what they are.

    Raises InputError for a schedule without a stable phase, a step that leaves none to decay in, or the run itself.
    """
    origin = Origin.of(settings)
    if origin is None:
        return settings
    where, schedule = f"decay_from = {settings.decay_from}", settings.optim.schedule
    require(
        settings.run_dir is None or not same_place(origin.run.path, settings.run_dir),
        f"{where} is the run's own directory; give the branch another --run-dir",
    )
    require(
        origin.step < settings.steps,
        f"{where} leaves no step to decay in; --steps {settings.steps} must be more than that",
    )
    match schedule:
        case Cosine():
            raise InputError(
                f"{where}: a branch decays as WSD does; optim.schedule must be Constant or WSD, not Cosine"
            )
        case Constant():
            schedule = WSD(schedule.warmup_steps, decay_start=origin.step)
        case WSD():
            require(
                schedule.decay_start in (None, origin.step),
                f"{where}, but optim.schedule.decay_start = {schedule.decay_start}; leave that out",
            )
            schedule = dataclasses.replace(schedule, decay_start=origin.step)
    return dataclasses.replace(settings, optim=dataclasses.replace(settings.optim, schedule=schedule))


def check(settings: Config, *, allow_learning_rate: bool = False) -> None:
    """Refuses a branch that cannot begin: no such run or checkpoint, one outside the run's stable phase, or a run of
    another model, objective or optimiser. All but learning rate and schedule are as when a run is resumed.

    Raises InputError in the manner of `run_directory.check_resume`.
    """
    origin = Origin.of(settings)
    if origin is None:
        return
    where, (run, step) = f"decay_from = {settings.decay_from}", origin
    saved = run.read_config()
    require(saved is not None, f"{where}: {run.path} is no run directory; it has no config.json")
    assert saved is not None
    source = recipe.from_dict(saved)
    free = (*FREE, *(LEARNING_RATE if allow_learning_rate else ()), "optim.schedule", "decay_from")
    changed = changes(recipe.to_dict(source), recipe.to_dict(settings), free)
    if changed:
        lines = "".join(f"\n  {key}: {text}" for key, text in changed)
        raise InputError(f"{where}: a branch is of the same model, data and optimiser as its run; undo:{lines}")
    schedule = source.optim.schedule
    require(not isinstance(schedule, Cosine), f"{where}: that run has a Cosine schedule, and so no stable phase")
    warmup = schedule.warmup_steps
    require(step >= warmup, f"{where} lies in that run's warm-up, which lasts to step {warmup}")
    if isinstance(schedule, WSD):
        begins = schedule.decay_begins(source.steps)
        require(step <= begins, f"{where} lies in that run's own decay, which begins at step {begins}")
    steps = Checkpoints(run.checkpoints, keep=1).steps()
    require(
        step in steps,
        f"{where}: that run has checkpoints of steps {', '.join(map(str, steps)) or 'none'}; "
        "its checkpoint.keep_every says which stay",
    )
