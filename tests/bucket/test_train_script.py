"""train.py and eval.py on a run directory in a bucket: the same run as on a disk."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = "gs://bucket/runs/x"
STEPS = 24


def download(storage, folder: Path) -> Path:
    for name in storage.names("runs/x/"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(storage.objects[name].content)
    return folder / "runs" / "x"


def end(process: "subprocess.Popen[bytes]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.slow
def test_stopped_killed_and_resumed_it_is_the_run_on_a_disk(storage, environment, scripts, trained, tmp_path):
    started = []

    def train(*flags, run_dir=RUN):
        started.append(scripts.start("train.py", scripts.recipe, "--run-dir", run_dir, *flags, **environment))
        return started[-1]

    def wait_for(condition) -> None:
        until = time.monotonic() + 120
        while not condition():
            assert started[-1].poll() is None, end(started[-1])
            assert time.monotonic() < until, "nothing happened"
            time.sleep(0.001)

    # A signal: what was logged is there, and the lock is free at once.
    process = train()
    wait_for(lambda: storage.names("runs/x/checkpoints/4/"))
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process)
    assert code == 75, err
    assert out.startswith(f"run directory {RUN}, 0 of {STEPS} steps taken\n")
    assert "runs/x/lock" not in storage.objects

    # Killed when the checkpoint of step 20 is whole but for its manifest: its lock is still there.
    def kill(request):
        if request.startswith("POST") and "runs/x/checkpoints/20/items.json" in storage.objects:
            process.kill()
            raise storage.Refused(403)

    storage.before = kill
    process = train()
    code, _, err = end(process)
    assert code == -signal.SIGKILL, err
    storage.before = lambda request: None
    assert "runs/x/lock" in storage.objects and "runs/x/checkpoints/20/manifest.json" not in storage.objects
    del storage.objects["runs/x/lock"]  # as after a minute

    code, out, err = end(train())
    assert code == 0, err
    assert f"run directory {RUN}, 16 of {STEPS} steps taken" in out and "step 20 in" in err
    local, there = trained[0], download(storage, tmp_path)
    scripts.assert_same_run(there, local)
    names = {path.name for path in local.iterdir()} - {"lock"}
    assert {path.name for path in there.iterdir()} == names
    assert {path.name for path in (there / "checkpoints").iterdir()} == {"16", "20", "24"}
    assert len(list((there / "tensorboard").iterdir())) >= 2

    # It is evaluated, and another begins with its parameters.
    code, out, err = scripts.run("eval.py", RUN, **environment)
    assert code == 0, err
    loss = json.loads(storage.objects["runs/x/eval.json"].content)["loss"]
    assert loss == json.loads((there / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    code, out, err = end(train("--init-from", RUN, "--steps", 4, run_dir=tmp_path / "other"))
    assert code == 0, err
    first = json.loads((tmp_path / "other" / "metrics.jsonl").read_text().splitlines()[0])
    untrained = json.loads((there / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"] - loss) < 0.5 < untrained["loss"] - loss


HOST = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jmoe import distributed
from jmoe.checkpoint import Checkpoints
from jmoe.run_directory import RunDirectory

run_dir, address, process = sys.argv[1:]
distributed.start(distributed.Distributed(address, 2, int(process), timeout=30))
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
value = jax.make_array_from_callback((4096,), sharding, lambda index: np.arange(4096, dtype=np.float32)[index])
like = {"params": {"w": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)}}
with RunDirectory.open(run_dir) as run:
    assert run.is_writer == (process == "0") and run.read_config() is None
    if run.is_writer:
        run.write_config({"d_model": 4})
    run.upload()
    checkpoints = Checkpoints(run.checkpoints, keep=1)
    for step in (1, 2):
        checkpoints.save(step, {"params": {"w": value + step}}, metadata={})
    checkpoints.wait()
    step, items = checkpoints.restore(like)
    assert step == 2 and RunDirectory(run_dir).read_config() == {"d_model": 4}
    for shard in items["params"]["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(4096)[shard.index] + 2)
    checkpoints.close()
"""


def test_two_hosts_save_and_restore(storage, environment):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, RUN, address, str(process)],
            env=variables | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for process in (0, 1)
    ]
    for code, _, err in [end(process) for process in started]:
        assert code == 0, err
    step = "runs/x/checkpoints/2/"
    files = json.loads(storage.objects[f"{step}manifest.json"].content)["files"]
    sizes = [sum(size for name, (size, _) in files.items() if f"/ocdbt.process_{i}/d/" in name) for i in (0, 1)]
    assert 0.8 < sizes[1] / sizes[0] < 1.25  # each wrote its half
    assert all(name.startswith(step) or name == "runs/x/config.json" for name in storage.names())
