"""Two processes with four devices each train as one process with eight: as users start them, on this machine."""

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jmoe import config, recipe, sharding, training
from jmoe.checkpoint import Checkpoints, flatten

STEPS = 24
MESH = ("--mesh.fsdp", 4, "--mesh.expert", 2)  # every parameter lies on both hosts
COMMON = ("--batch-size", 8, "--checkpoint.keep", 6)
LOST_AFTER = 15  # seconds


def devices(number):
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={number} --xla_backend_optimization_level=0"}


def start_two(scripts, script, *arguments, own=((), ())):
    """Two processes of one script; `own` are flags of the one and of the other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        scripts.start(
            script,
            *arguments,
            *own[process],
            *("--distributed.coordinator", f"localhost:{port}", "--distributed.timeout", LOST_AFTER),
            *("--distributed.processes", 2, "--distributed.process", process),
            **devices(4),
        )
        for process in (0, 1)
    ]


def start(scripts, run_dir, *flags, **own):
    """Two processes that train."""
    return start_two(scripts, "train.py", scripts.recipe, "--run-dir", run_dir, *MESH, *COMMON, *flags, **own)


def end(processes):
    """(exit code, standard output, standard error) of each. XLA's transport writes to standard output too."""
    told = [process.communicate(timeout=240) for process in processes]
    return [
        (process.returncode, out.decode(), err.decode()) for process, (out, err) in zip(processes, told, strict=True)
    ]


def wait_for_lines(run_dir, count, processes):
    path, limit = run_dir / "metrics.jsonl", time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert all(process.poll() is None for process in processes), end(processes)
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.001)


def saved_steps(run_dir):
    return Checkpoints(run_dir / "checkpoints", keep=1).steps()


def saved_state(run_dir):
    """Every leaf of the last checkpoint by name, read by this process onto one device."""
    settings = recipe.from_dict(json.loads((run_dir / "config.json").read_text()))
    abstract = training.abstract_state(settings, sharding.make_mesh(config.Mesh(), jax.devices()[:1]))
    items = training.checkpoint_items(abstract, {"tokenizer": "", "train source 0": "", "validation source 0": ""})
    restored = Checkpoints(run_dir / "checkpoints", keep=1).restore(items, STEPS, read_only=True)
    assert restored is not None
    return flatten(restored[1])


def assert_learnt_the_same(run_dir, reference):
    """Processes add up in another order. Every step is there once, on the same rows."""
    found, expected = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run_dir, reference)
    )
    for key in ("step", "split"):
        assert [record[key] for record in found] == [record[key] for record in expected]
    for key in ("loss", "experts_per_token"):
        values = ([record[key] for record in records] for records in (found, expected))
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=key)
    state, wanted = saved_state(run_dir), saved_state(reference)
    assert state.keys() == wanted.keys() and int(state["data/step"]) == STEPS
    for name, value in wanted.items():
        if name.startswith(("params/", "optimizer/")):
            np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=3e-5, err_msg=name)


@pytest.fixture(scope="module")
def one_process(scripts, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    code, _, err = scripts.train(run_dir, *MESH, *COMMON, **devices(8))
    assert code == 0, err
    return run_dir


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_saved(one_process, scripts, tmp_path):
    """They learn the same; the first alone prints and writes."""
    run_dir = shutil.copytree(one_process, tmp_path / "run")
    for step in saved_steps(run_dir):
        if step > 8:
            shutil.rmtree(run_dir / "checkpoints" / str(step))
    (code, out, err), (other_code, other_out, _) = end(start(scripts, run_dir, "--data.workers", 2))
    assert (code, other_code) == (0, 0), err
    for line in (f"run directory {run_dir}, 8 of {STEPS} steps taken\n", "\nvalidation loss  ", "\na sample:\n\n"):
        assert line in out and line not in other_out
    assert saved_steps(run_dir) == saved_steps(one_process)
    assert_learnt_the_same(run_dir, one_process)

    # They evaluate it as the training did.
    (code, out, err), (other_code, other_out, _) = end(start_two(scripts, "eval.py", run_dir, *MESH))
    assert (code, other_code) == (0, 0), err
    found = json.loads((run_dir / "eval.json").read_text())
    trained = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"\nloss           {found['loss']:.4f} " in out and "\nloss " not in other_out
    for key in ("step", "tokens", "loss", "bits_per_byte", "experts_per_token"):
        np.testing.assert_allclose(found[key], trained[key], rtol=1e-5, err_msg=key)


@pytest.mark.slow
def test_stopped_killed_and_ended_by_one_process_on_another_mesh(one_process, scripts, tmp_path):
    run_dir = tmp_path / "run"

    # SIGTERM to one: both save the same step and say so by their exit code.
    processes = start(scripts, run_dir, "--checkpoint.every", 1000)
    wait_for_lines(run_dir, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), (other_code, _, other_err) = end(processes)
    assert (code, other_code) == (75, 75), err + other_err
    (stopped,) = saved_steps(run_dir)
    assert 5 <= stopped < STEPS
    assert f"step {stopped} is saved, the same command goes on\n" in out
    files = json.loads((run_dir / "checkpoints" / str(stopped) / "manifest.json").read_text())["files"]
    sizes = [sum(s for name, (s, _) in files.items() if f"/ocdbt.process_{i}/d/" in name) for i in (0, 1)]
    assert 0.8 < sizes[1] / sizes[0] < 1.25  # each wrote its half

    # SIGKILL to one: the other ends in the time that was set, and says why.
    processes = start(scripts, run_dir, "--checkpoint.every", 1)
    wait_for_lines(run_dir, stopped + 3, processes)
    processes[1].kill()
    killed = time.monotonic()
    (code, out, err), _ = end(processes)
    assert time.monotonic() - killed < LOST_AFTER + 10
    assert code not in (0, 2, 75) and "another task died" in err
    reached = max(saved_steps(run_dir))
    assert stopped < reached < STEPS

    # One process with other devices takes it from there.
    code, out, err = scripts.train(run_dir, *COMMON, "--mesh.data", 2, **devices(2))
    assert code == 0, err
    assert f"{reached} of {STEPS} steps taken" in out
    assert_learnt_the_same(run_dir, one_process)


@pytest.mark.slow
def test_processes_that_do_not_agree_end_before_they_train(scripts, tmp_path):
    (code, _, err), (other_code, _, other_err) = end(
        start(scripts, tmp_path / "run", own=(("--seed", 0), ("--seed", 1)))
    )
    message = "configuration and text are not the same here as on process 0"
    assert (code, other_code) == (2, 2), err + other_err
    assert f"error: process 1: {message}\n" in err and f"error: {message}\n" in other_err
