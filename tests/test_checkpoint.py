"""Checkpoints: bitwise round trips, every kind of damage, failed saves, kills, and other meshes."""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jmoe import checkpoint as module
from jmoe.checkpoint import CheckpointError, Checkpoints, flatten, unflatten


class Block(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.Linear(3, 4, rngs=rngs)
        self.experts = nnx.List([nnx.Linear(4, 8, rngs=rngs, param_dtype=jnp.bfloat16) for _ in range(2)])


def state(seed: int) -> dict:
    """Items of every dtype a run holds, different for every seed."""
    params = Block(nnx.Rngs(seed))
    optimizer = optax.adamw(1e-3).init(params)
    optimizer = jax.tree.map(lambda x: (x + seed + 1).astype(x.dtype), optimizer)
    return {
        "params": params,
        "optimizer": optimizer,
        "data": {"position": 2**40 + seed, "fingerprint": f"abc{seed}", "scale": 0.1 + seed},
        "random": {"key": jax.random.key(seed), "rbg": jax.random.key(seed, impl="rbg")},
        "host": {"counts": np.arange(5, dtype=np.int64) + seed},
    }


def raw(leaf):
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    if hasattr(leaf, "dtype"):
        return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()
    return type(leaf), leaf


def same(a, b) -> bool:
    a, b = flatten(a), flatten(b)
    return list(a) == list(b) and all(raw(a[name]) == raw(b[name]) for name in a)


def abstract(items):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, items)


SMALL = {"params": {"w": jax.ShapeDtypeStruct((512,), jnp.float32)}, "data": {"next": 0}}


def small(step: int) -> dict:
    return {"params": {"w": jnp.arange(512, dtype=jnp.float32) + step}, "data": {"next": step}}


def save_small(directory: Path, *steps: int, keep: int = 10, **options) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep=keep, **options)
    for step in steps:
        checkpoints.save(step, small(step), metadata={})
    checkpoints.wait()
    return checkpoints


def array_file(step_directory: Path) -> Path:
    return max((file for file in (step_directory / "params").rglob("d/*")), key=lambda file: file.stat().st_size)


# ----------------------------------------------------------------------------------------------------------- flattening


def test_names_are_paths_without_the_variables_value():
    items = state(0)
    assert set(flatten(items["params"])) == {
        *("query/kernel", "query/bias", "experts/0/kernel", "experts/0/bias", "experts/1/kernel", "experts/1/bias")
    }
    assert "0/mu/query/kernel" in flatten(items["optimizer"])
    assert flatten(jnp.ones(2)).keys() == {"value"}
    with pytest.raises(ValueError, match="named a"):
        flatten({"a": 1, "a/value": 2})


def test_unflatten_inverts_flatten_and_names_what_does_not_fit():
    params = state(0)["params"]
    assert same(unflatten(flatten(params), params), params)
    flat = flatten(params)
    flat["extra"] = flat.pop("query/bias")
    flat["query/kernel"] = jnp.ones((3, 5))
    flat["experts/0/bias"] = flat["experts/0/bias"].astype(jnp.float32)
    with pytest.raises(CheckpointError) as error:
        unflatten(flat, params)
    for part in (
        "query/bias (float32[4]) is missing",
        "extra (float32[4]) is left over",
        "query/kernel is float32[3,5], expected float32[3,4]",
        "experts/0/bias is float32[8], expected bfloat16[8]",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- round trips


def test_round_trip_is_bitwise(tmp_path):
    items = state(3)
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(7, items, metadata={"model": {"d_model": 4, "list": [1, None, 2.5]}})
    checkpoints.close()

    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.steps() == [7]
    assert again.metadata(7) == {"model": {"d_model": 4, "list": [1, None, 2.5]}}
    restored = again.restore(abstract(state(0)))
    assert restored is not None
    step, got = restored
    assert step == 7
    assert isinstance(got["params"], Block)
    assert same(got, items)
    assert not same(got, state(4))
    assert jax.random.uniform(got["random"]["key"]) == jax.random.uniform(items["random"]["key"])


def test_some_items_and_an_item_without_leaves(tmp_path):
    items = {**state(1), "empty": optax.identity().init(None)}
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, items, metadata={})
    checkpoints.wait()
    _, got = checkpoints.restore(abstract({"params": items["params"], "empty": items["empty"]}), read_only=True)
    assert got.keys() == {"params", "empty"}
    assert same(got["params"], items["params"])
    assert got["empty"] == items["empty"]


def test_nothing_saved_is_none(tmp_path):
    assert Checkpoints(tmp_path / "new", keep=1).restore(SMALL) is None
    assert Checkpoints(tmp_path / "new", keep=1).steps() == []
    assert not (tmp_path / "new").exists()


def test_saved_arrays_may_be_donated_or_overwritten_at_once(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=8)
    tree = {f"w{i}": jnp.zeros((512, 1024)) for i in range(8)}
    tree = step(tree)
    host = np.ones(100_000)
    for n in range(1, 5):
        host[:] = n
        checkpoints.save(n, {"params": tree, "host": {"x": host}}, metadata={})
        host[:] = -1
        tree = step(tree)
    checkpoints.wait()
    like = {"params": jax.eval_shape(lambda: tree), "host": {"x": host}}
    for n in range(1, 5):
        _, got = checkpoints.restore(like, n)
        assert all((np.asarray(x) == n).all() for x in jax.tree.leaves(got))


def test_any_mesh_restores_any_mesh(tmp_path):
    assert len(jax.devices()) == 8, "tests run with --xla_force_host_platform_device_count=8"

    def on(mesh, spec, items):
        specs = {"w": spec, "key": PartitionSpec()}
        return {
            "params": {name: jax.device_put(items["params"][name], NamedSharding(mesh, specs[name])) for name in specs}
        }

    eight = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    four = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    plain = {"params": {"w": jax.random.normal(jax.random.key(0), (16, 8)), "key": jax.random.key(5)}}
    saved = on(eight, PartitionSpec("fsdp"), plain)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, saved, metadata={})
    checkpoints.wait()
    for target in (on(four, PartitionSpec("tensor", "data"), plain), plain, saved):
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        _, got = checkpoints.restore(like)
        assert same(got, plain)
        assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(lambda x: x.sharding, target)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jax.ShapeDtypeStruct((512,), jnp.bfloat16)}, r"w is float32\[512\], expected bfloat16\[512\]"),
        ({"w": jax.ShapeDtypeStruct((256,), jnp.float32)}, r"w is float32\[512\], expected float32\[256\]"),
        ({"v": jax.ShapeDtypeStruct((512,), jnp.float32)}, r"v \(float32\[512\]\) is missing; w .* is left over"),
    ],
)
def test_another_model_is_refused_and_nothing_moved(tmp_path, like, message):
    checkpoints = save_small(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=f"params of step 2 .*{message}"):
        checkpoints.restore({"params": like})
    assert checkpoints.steps() == [1, 2]


# ---------------------------------------------------------------------------------------------------------- keep-policy


def test_the_newest_and_every_mth_are_kept(tmp_path):
    assert save_small(tmp_path, 10, 20, 25, 30, 35, 40, keep=2, keep_every=20).steps() == [20, 35, 40]
    assert {path.name for path in tmp_path.iterdir()} == {"20", "35", "40"}


def test_the_only_one_kept_goes_when_the_next_is_complete_and_not_before(tmp_path, monkeypatch):
    checkpoints = save_small(tmp_path, 1, keep=1)
    write, there = module.write_json, []

    def watched(file, content):
        if file.name == module.MANIFEST:
            there.append(checkpoints.steps())
            if len(there) == 1:
                raise OSError("no space left")
        write(file, content)

    monkeypatch.setattr(module, "write_json", watched)
    checkpoints.save(2, small(2), metadata={})
    with pytest.raises(CheckpointError, match="saving step 2 to .* failed: no space left"):
        checkpoints.wait()
    assert checkpoints.restore(SMALL, read_only=True)[0] == 1
    checkpoints.save(3, small(3), metadata={})
    checkpoints.wait()
    assert there == [[1], [1]] and checkpoints.steps() == [3]
    assert {path.name for path in tmp_path.iterdir()} == {"3"}


def test_a_complete_step_is_not_written_again(tmp_path):
    checkpoints = save_small(tmp_path, 1)
    before = (tmp_path / "1" / "manifest.json").stat()
    checkpoints.save(1, small(1), metadata={})
    checkpoints.close()
    assert (tmp_path / "1" / "manifest.json").stat() == before


# --------------------------------------------------------------------------------------------------------------- damage


def truncate(step: Path):
    file = array_file(step)
    os.truncate(file, file.stat().st_size // 2)


def flip_bit(step: Path):
    content = bytearray(array_file(step).read_bytes())
    content[len(content) // 2] ^= 1
    array_file(step).write_bytes(content)


def empty(step: Path):
    shutil.rmtree(step)
    step.mkdir()


def delete_file(step: Path):
    array_file(step).unlink()


def flip_manifest(step: Path):
    content = bytearray((step / "manifest.json").read_bytes())
    content[content.rindex(b'"') - 5] ^= 1
    (step / "manifest.json").write_bytes(content)


def empty_manifest(step: Path):
    (step / "manifest.json").write_text("")


def list_manifest(step: Path):
    (step / "manifest.json").write_text("[1]")


def edit_items(step: Path):
    (step / "items.json").write_text((step / "items.json").read_text().replace("512", "513"))


DAMAGE = [
    (truncate, r"params/.* has \d+ bytes, \d+ were written"),
    (flip_bit, "params/.* has other content than was written"),
    (empty, "manifest.json is missing"),
    (delete_file, "params/.* is missing"),
    (flip_manifest, "has other content"),
    (empty_manifest, "manifest.json cannot be used"),
    (list_manifest, "manifest.json cannot be used"),
    (edit_items, "items.json has other content"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_newest_is_reported_and_the_previous_used(tmp_path, caplog, damage, reason):
    save_small(tmp_path, 10, 20).close()
    damage(tmp_path / "20")

    reader = Checkpoints(tmp_path, keep=2)
    assert reader.restore(SMALL, read_only=True)[0] == 10
    with pytest.raises(CheckpointError, match=f"step 20 .*{reason}"):
        reader.restore(SMALL, 20)
    assert (tmp_path / "20").is_dir()

    caplog.clear()
    checkpoints = Checkpoints(tmp_path, keep=2)
    step, got = checkpoints.restore(SMALL)
    assert step == 10
    assert same(got, small(10))
    warning = caplog.records[0]
    assert warning.levelno == logging.WARNING and warning.name == "jmoe"
    assert "step 20" in warning.message and "\n" not in warning.message
    assert re.search(reason, warning.message)
    assert (tmp_path / "damaged-20").is_dir()

    checkpoints.save(20, small(20), metadata={})
    checkpoints.close()
    assert checkpoints.restore(SMALL)[0] == 20


@pytest.mark.parametrize("damage", [flip_bit, empty], ids=lambda value: value.__name__)
def test_where_none_is_good_it_refuses_every_time(tmp_path, damage):
    save_small(tmp_path, 10, 20).close()
    for step in (10, 20):
        damage(tmp_path / str(step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* is good.*step 20: .*; step 10: "):
            Checkpoints(tmp_path, keep=2).restore(SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"10", "20"}


def test_manifests_deleted_from_all_is_not_a_fresh_start(tmp_path):
    save_small(tmp_path, 10, 20).close()
    for step in (10, 20):
        (tmp_path / str(step) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step 10: manifest.json is missing"):
        Checkpoints(tmp_path, keep=2).restore(SMALL)
    assert (tmp_path / "20").is_dir()


def test_a_save_cut_off_before_its_manifest_is_removed(tmp_path, caplog):
    caplog.set_level(logging.INFO, "jmoe")
    save_small(tmp_path, 10, 20).close()
    (tmp_path / "20" / "manifest.json").unlink()
    (tmp_path / "30.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "removed-5").mkdir()
    assert Checkpoints(tmp_path, keep=2).restore(SMALL, read_only=True)[0] == 10
    assert (tmp_path / "20").is_dir()
    assert Checkpoints(tmp_path, keep=2).restore(SMALL)[0] == 10
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.INFO]
    assert [path.name for path in tmp_path.iterdir()] == ["10"]


def test_where_the_only_step_has_no_manifest_it_is_moved_aside(tmp_path, caplog):
    manifests = []
    for name in ("unfinished-10", "unfinished-10-2"):
        save_small(tmp_path, 10).close()
        manifests.append((tmp_path / "10" / "manifest.json").read_bytes())
        (tmp_path / "10" / "manifest.json").unlink()
        before = {path.name for path in tmp_path.iterdir()}
        assert Checkpoints(tmp_path, keep=1).restore(SMALL, read_only=True) is None
        assert {path.name for path in tmp_path.iterdir()} == before
        caplog.clear()
        assert Checkpoints(tmp_path, keep=1).restore(SMALL) is None
        (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
        assert warning.message == f"the unfinished checkpoint of step 10 is now {tmp_path / name}"
        assert {path.name for path in tmp_path.iterdir()} == before - {"10"} | {name}
    # The run goes on beside it, and once its manifest is found again nothing is lost.
    assert save_small(tmp_path, 5, keep=1).restore(SMALL)[0] == 5
    (tmp_path / "unfinished-10").rename(tmp_path / "10")
    (tmp_path / "10" / "manifest.json").write_bytes(manifests[0])
    step, got = Checkpoints(tmp_path, keep=1).restore(SMALL)
    assert step == 10 and same(got, small(10))


def test_two_damaged_steps_are_stepped_over(tmp_path):
    save_small(tmp_path, 1, 2, 3).close()
    flip_bit(tmp_path / "3")
    flip_bit(tmp_path / "2")
    (tmp_path / "damaged-3").mkdir()
    assert Checkpoints(tmp_path, keep=2).restore(SMALL)[0] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"1", "damaged-2", "damaged-3", "damaged-3-2"}


def test_damage_to_an_item_not_asked_for_does_not_matter(tmp_path):
    checkpoints = save_small(tmp_path, 1)
    flip_bit(tmp_path / "1")
    assert checkpoints.restore({"data": {"next": 0}}, read_only=True) == (1, {"data": {"next": 1}})


def test_an_unknown_step_is_told_with_those_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"step 5 .* no such checkpoint; complete steps are \[1, 2\]"):
        save_small(tmp_path, 1, 2).restore(SMALL, 5)


# --------------------------------------------------------------------------------------------------- saves that fail

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp
from jmoe.checkpoint import CheckpointError, Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(Path(sys.argv[1]), keep=3)
def items(step):
    return {"params": {"w": jnp.arange(100_000, dtype=jnp.float32) + step}}
checkpoints.save(1, items(1), metadata={})
checkpoints.wait()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
checkpoints.save(2, items(2), metadata={})
while not checkpoints._pending.done():
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
try:
    checkpoints.save(3, items(3), metadata={})
except CheckpointError as error:
    print("told:", error)
checkpoints.save(4, items(4), metadata={})
checkpoints.close()
print("steps:", checkpoints.steps(), sorted(path.name for path in Path(sys.argv[1]).iterdir()))
step, got = checkpoints.restore(items(0))
print("restored:", step, (got["params"]["w"] == items(4)["params"]["w"]).all())
"""


def environment() -> dict:
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}


def test_a_full_disk_fails_one_save_and_not_the_next(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told, steps, restored = done.stdout.splitlines()
    assert "saving step 2" in told and "failed" in told
    assert steps == "steps: [1, 3, 4] ['1', '3', '4']"
    assert restored == "restored: 4 True"


def test_a_save_that_cannot_start_is_told_and_the_next_works(tmp_path, capfd):
    (tmp_path / "c").write_text("a file where the directory should be")
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(1, small(1), metadata={})
    with pytest.raises(CheckpointError, match="saving step 1 to .* failed"):
        checkpoints.wait()
    checkpoints.wait()
    (tmp_path / "c").unlink()
    checkpoints.save(2, small(2), metadata={})
    checkpoints.close()
    assert checkpoints.restore(SMALL)[0] == 2


# ---------------------------------------------------------------------------------------------------------------- kills

SAVING_LOOP = """
import logging, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jmoe.checkpoint import Checkpoints

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
logging.getLogger("absl").setLevel(logging.ERROR)
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
def items(step):
    return {"params": {f"w{i}": jnp.full(100_000, step + i, jnp.float32) for i in range(4)}, "data": {"next": step}}
restored = checkpoints.restore(jax.eval_shape(lambda: items(0)) | {"data": {"next": 0}})
step = 0
if restored:
    step, got = restored
    assert got["data"]["next"] == step
    assert all((got["params"][k] == v).all() for k, v in items(step)["params"].items()), "restored other arrays"
print("start", step)
while True:
    step += 1
    checkpoints.save(step, items(step), metadata={})
    print("saved", step - 1)
"""


def test_killed_at_any_moment_it_can_be_restored(tmp_path):
    rng = random.Random(0)
    known = 0
    output = ""
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVING_LOOP, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
            text=True,
        )
        for line in child.stdout:
            output += line
            if line.startswith("start"):
                start = int(line.split()[1])
                break
        else:
            pytest.fail(output)
        # A save waits for the one before it, so that all steps printed as saved are complete on disk.
        assert start >= known, f"{known} was complete, the restart began at {start}\n{output}"
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(child.pid, signal.SIGKILL)
        rest, _ = child.communicate()
        output += rest
        known = max([start] + [int(line.split()[1]) for line in rest.splitlines() if line.startswith("saved")])
    assert known > 1, output
    assert "damaged" not in output
    manifest = json.loads((tmp_path / str(known) / "manifest.json").read_text())
    assert "items.json" in manifest["files"]
