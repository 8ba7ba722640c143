"""Branching a decay from the stable phase of another run."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jmoe import branch, recipe, sharding, training
from jmoe.checkpoint import MANIFEST, Checkpoints
from jmoe.config import WSD, AdamW, Config, Constant, Cosine, InputError, Model
from jmoe.run_directory import RunDirectory, check_resume


def settings(**changes) -> Config:
    return dataclasses.replace(Config(optim=AdamW(schedule=Constant(4)), steps=100, run_dir="branch"), **changes)


@pytest.fixture
def stable(tmp_path):
    """Makes the directory of a run of these settings, with checkpoints of steps 40 and 80 by name only."""

    def make(source: Config):
        run = RunDirectory(tmp_path / "stable")
        for step in (2, 40, 80, 99):
            (run.checkpoints / str(step)).mkdir(parents=True)
            (run.checkpoints / str(step) / MANIFEST).touch()
        run.write_config(recipe.to_dict(source))
        return run.path

    return make


def test_the_schedule_of_a_branch_decays_from_where_it_branches():
    assert branch.resolve(settings()) == settings()
    resolved = branch.resolve(settings(decay_from="runs/a@80"))
    assert resolved.optim.schedule == WSD(4, decay_start=80)
    assert branch.resolve(resolved) == resolved
    assert recipe.from_dict(recipe.to_dict(resolved)) == resolved
    linear = AdamW(schedule=WSD(4, decay_fraction=0.5, shape="linear", final=0.1))
    schedule = branch.resolve(settings(decay_from="runs/a@80", optim=linear)).optim.schedule
    assert schedule == WSD(4, 0.5, 80, "linear", 0.1)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"run_dir": "runs/../runs/a"}, "decay_from = runs/a@80 is the run's own directory; give the branch another"),
        ({"steps": 80}, "decay_from = runs/a@80 leaves no step to decay in; --steps 80 must be more"),
        ({"optim": AdamW(schedule=Cosine())}, "optim.schedule must be Constant or WSD, not Cosine"),
        ({"optim": AdamW(schedule=WSD(decay_start=70))}, "but optim.schedule.decay_start = 70; leave that out"),
    ],
)
def test_a_schedule_that_cannot_decay_is_refused(changes, line):
    with pytest.raises(InputError) as error:
        branch.resolve(settings(decay_from="runs/a@80", **changes))
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "runs/a", "@80", "runs/a@", "runs/a@-1", "runs/a@last"])
def test_the_form_of_decay_from(text):
    with pytest.raises(InputError, match="it must be RUN@STEP, a run directory and the step of a checkpoint"):
        settings(decay_from=text)


@pytest.mark.parametrize(
    "source, step, line",
    [
        (settings(), 80, None),
        (settings(steps=80, checkpoint=Config().checkpoint, log_every=1), 80, None),
        (settings(optim=AdamW(schedule=WSD(4, decay_fraction=0.2))), 80, None),
        (settings(), 41, "that run has checkpoints of steps 2, 40, 80, 99; its checkpoint.keep_every says which stay"),
        (settings(), 2, "@2 lies in that run's warm-up, which lasts to step 4"),
        (settings(optim=AdamW(schedule=WSD(4))), 99, "@99 lies in that run's own decay, which begins at step 90"),
        (settings(optim=AdamW(schedule=Cosine(4))), 80, "that run has a Cosine schedule, and so no stable phase"),
        (settings(model=Model(d_model=64)), 80, "undo:\n  model.d_model: run has 64, command says 128"),
        (settings(optim=AdamW(b1=0.8, schedule=Constant(4))), 80, "undo:\n  optim.b1: run has 0.8, command says 0.9"),
        (settings(optim=AdamW(1e-4, Constant(4))), 80, "undo:\n  optim.learning_rate: run has 0.0001, command says"),
    ],
)
def test_where_a_branch_may_begin(stable, source, step, line):
    config = branch.resolve(settings(steps=200, decay_from=f"{stable(source)}@{step}"))
    if line is None:
        return branch.check(config)
    with pytest.raises(InputError) as error:
        branch.check(config)
    assert line in str(error.value)
    if "learning_rate" in line:
        branch.check(config, allow_learning_rate=True)


def test_a_branch_resumes_as_a_branch_only():
    was = recipe.to_dict(branch.resolve(settings(decay_from="runs/a@80")))
    check_resume(was, was)
    with pytest.raises(InputError, match='decay_from: run has "runs/a@80", command says null'):
        check_resume(was, recipe.to_dict(settings()))


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="none is no run directory; it has no config.json$"):
        branch.check(settings(decay_from=f"{tmp_path}/none@80"))
    branch.check(settings())


def state(run_dir, step):
    config = recipe.from_dict(json.loads((run_dir / "config.json").read_text()))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    fingerprints = {"tokenizer": "", "train source 0": "", "validation source 0": ""}
    items = training.checkpoint_items(training.abstract_state(config, mesh), fingerprints)
    del items["random"]
    restored = Checkpoints(run_dir / "checkpoints", keep=1).restore(items, step, read_only=True)
    assert restored is not None
    return restored[1]


def train_losses(run_dir):
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["loss"], r["learning_rate"]) for r in records if r["split"] == "train"}


@pytest.mark.slow
def test_a_branch_goes_on_exactly_and_resumes_without_its_origin(trained, scripts, tmp_path):
    """The first step of a decay is at the full rate still: its loss and the next are those of the run, bit for bit,
    which takes its parameters, optimiser state and data; then they part."""
    origin, run_dir = shutil.copytree(trained[0], tmp_path / "origin"), tmp_path / "branch"
    flags = ("--decay-from", f"{origin}@16", "--steps", 26, "--checkpoint.every", 5)
    code, out, err = scripts.train(run_dir, *flags)
    assert code == 0, err
    assert f"16 of 26 steps taken, branched from {origin}@16" in out
    config = recipe.from_dict(json.loads((run_dir / "config.json").read_text()))
    assert (config.decay_from, config.optim.schedule) == (f"{origin}@16", WSD(4, decay_start=16))

    was, now = train_losses(trained[0]), train_losses(run_dir)
    assert list(now) == list(range(17, 27))
    assert [now[step][0] == was[step][0] for step in (17, 18, 19)] == [True, True, False]
    np.testing.assert_allclose([r for _, r in now.values()], 1e-2 * (1 - np.sqrt(np.arange(10) / 10)), rtol=1e-6)

    metrics, end = (run_dir / "metrics.jsonl").read_bytes(), state(run_dir, 26)
    shutil.rmtree(run_dir / "checkpoints" / "26")
    shutil.rmtree(origin)
    code, out, err = scripts.train(run_dir, *flags)
    assert code == 0, err
    assert "25 of 26 steps taken" in out
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    jax.tree.map(np.testing.assert_array_equal, state(run_dir, 26), end)
