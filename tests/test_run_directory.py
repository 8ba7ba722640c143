"""The run directory: locking, its config.json, and what may change on resume."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jmoe.config import InputError
from jmoe.run_directory import RunDirectory, check_fingerprints, check_resume

HOLD = """
import sys
from jmoe.run_directory import RunDirectory
run = RunDirectory.open(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_it_is_created_and_locked_until_closed(tmp_path):
    path = tmp_path / "runs" / "tiny"
    with RunDirectory.open(path) as run:
        assert run.path == path and path.is_dir()
        assert run.checkpoints == path / "checkpoints" and not run.checkpoints.exists()
        assert run.metrics == path / "metrics.jsonl"
        with pytest.raises(InputError, match=f"{path} is in use by process {os.getpid()}; "):
            RunDirectory.open(path)
    RunDirectory.open(path).close()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout and child.stdout.readline() == "open\n"
        with pytest.raises(InputError, match=f"in use by process {child.pid}"):
            RunDirectory.open(tmp_path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    with RunDirectory.open(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run cannot be written to: Not a directory"):
        RunDirectory.open(tmp_path / "file" / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").mkdir()
    with pytest.raises(InputError, match="run cannot be written to"):
        RunDirectory.open(tmp_path / "run")


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://", "gcs://bucket/run"])
def test_other_urls_are_refused(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^run directory {url} must be a folder of a file system, or gs://"):
        RunDirectory.open(url)
    assert not list(tmp_path.iterdir())


def test_a_bucket_needs_the_extra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^run directory gs://bucket/run needs the extra gcs: .* 'jmoe\[gcs\]'$"):
        RunDirectory.open("gs://bucket/run")
    assert not list(tmp_path.iterdir())


def test_config_round_trip_and_broken_json(tmp_path):
    with RunDirectory.open(tmp_path) as run:
        assert run.read_config() is None
        config = {"model": {"d_model": 4, "layers": [{"kind": "MoE"}]}, "run_dir": None, "lr": 1e-3}
        run.write_config(config)
        assert run.read_config() == config
        assert '\n  "model"' in run.config.read_text()
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "lock"}
        run.config.write_text('{"model": ')
        with pytest.raises(InputError, match=r"config.json is not JSON: .*char 10"):
            run.read_config()
        run.config.write_text("[1]")
        with pytest.raises(InputError, match="config.json holds list"):
            run.read_config()


CONFIG = {
    "model": {
        "d_model": 8,
        "layers": [{"pattern": [{"kind": "MoE", "num_experts": 16}, {"kind": "Dense", "d_ff": 8}]}],
    },
    "data": {"sources": [{"kind": "Embedded", "weight": 1.0}], "workers": 1, "cache_dir": None, "seq_len": 256},
    "optim": {
        "kind": "AdamW",
        "learning_rate": 0.003,
        "b1": 0.9,
        "momentum_dtype": "float32",
        "schedule": {"kind": "Cosine", "warmup_steps": 20},
    },
    "mesh": {"data": 1},
    "checkpoint": {"every": 100},
    "evaluation": {"every": 100},
    "steps": 300,
    "steps_extra": 1,
    "run_dir": None,
}


def changed(path: str, value) -> dict:
    config = json.loads(json.dumps(CONFIG))
    *parents, last = [int(name) if name.isdecimal() else name for name in path.split(".")]
    place = config
    for name in parents:
        place = place[name]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 600),
        ("mesh.data", 8),
        ("checkpoint.every", 5),
        ("evaluation.every", 5),
        ("data.workers", 4),
        ("data.cache_dir", "/x"),
        ("run_dir", "elsewhere"),
    ],
)
def test_what_may_change(key, value):
    check_resume(CONFIG, CONFIG)
    check_resume(CONFIG, changed(key, value))


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("model.d_model", 64, "model.d_model: run has 8, command says 64"),
        ("model.layers.0.pattern.0.num_experts", 8, "model.layers.0.pattern.0.num_experts: run has 16, command says 8"),
        ("model.layers.0.pattern.1", {"kind": "MoE"}, 'layers.0.pattern.1.kind: run has "Dense", command says "MoE"'),
        ("model.layers.0.pattern", [], 'layers.0.pattern.0: run has {"kind": "MoE", "num_experts": 16}, c'),
        ("data.seq_len", None, "data.seq_len: run has 256, command says null"),
        ("data.new", 1, "data.new: run has no such entry, command says 1"),
        ("steps_extra", 2, "steps_extra: run has 1, command says 2"),
        ("optim.b1", 0.8, "optim.b1: run has 0.9, command says 0.8"),
        ("optim.b1", True, "optim.b1: run has 0.9, command says true"),
        ("optim.kind", "Muon", 'optim.kind: run has "AdamW", command says "Muon"'),
        ("optim.momentum_dtype", "bfloat16", 'optim.momentum_dtype: run has "float32", command says "bfloat16"'),
    ],
)
def test_what_may_not_change(key, value, line):
    for allow in (False, True):
        with pytest.raises(InputError) as error:
            check_resume(CONFIG, changed(key, value), allow_learning_rate=allow)
        assert line in str(error.value)
        assert "--allow-learning-rate-change" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.learning_rate", 0.001),
        ("optim.schedule.warmup_steps", 5),
        ("optim.schedule", {"kind": "Constant", "warmup_steps": 20}),
    ],
)
def test_the_learning_rate_may_change_with_its_flag(key, value):
    new = changed(key, value)
    with pytest.raises(InputError, match=r"--allow-learning-rate-change[\s\S]*optim\."):
        check_resume(CONFIG, new)
    check_resume(CONFIG, new, allow_learning_rate=True)


def test_all_differences_are_told_at_once():
    new = changed("model.d_model", 64)
    new["optim"]["learning_rate"] = 0.001
    with pytest.raises(InputError) as error:
        check_resume(CONFIG, new)
    first, *rest = str(error.value).splitlines()
    assert "cannot go on" in first
    assert rest == [
        "  model.d_model: run has 8, command says 64",
        "  optim.learning_rate: run has 0.003, command says 0.001",
    ]


def test_fingerprints():
    check_fingerprints({"tokenizer": "a", "data": "b"}, {"tokenizer": "a", "data": "b"})
    with pytest.raises(InputError, match='not what the run was trained on:\n  data: run has "b", command says "c"$'):
        check_fingerprints({"tokenizer": "a", "data": "b"}, {"tokenizer": "a", "data": "c"})
