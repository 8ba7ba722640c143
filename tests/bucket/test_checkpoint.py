"""Checkpoints in a bucket: what is written, every kind of damage, and a process that dies at any moment."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.checkpoint import CheckpointError, Checkpoints
from jmoe.storage import location

FOLDER = "runs/x/checkpoints"
LIKE = {"params": {"w": jax.ShapeDtypeStruct((512,), jnp.float32)}, "data": {"next": 0}}


def items(step: int) -> dict:
    return {"params": {"w": jnp.arange(512, dtype=jnp.float32) + step}, "data": {"next": step}}


def checkpoints(**options) -> Checkpoints:
    return Checkpoints(location(f"gs://bucket/{FOLDER}"), **{"keep": 5, **options})


def save(*steps: int, **options) -> Checkpoints:
    saving = checkpoints(**options)
    for step in steps:
        saving.save(step, items(step), metadata={"step": step})
    saving.wait()
    return saving


def restored(saving: Checkpoints, step: int | None = None, **options) -> int | None:
    """The step that is restored, its arrays checked."""
    found = saving.restore(LIKE, step, **options)
    if found is None:
        return None
    np.testing.assert_array_equal(found[1]["params"]["w"], items(found[0])["params"]["w"])
    assert found[1]["data"] == {"next": found[0]}
    return found[0]


def folders(storage) -> set[str]:
    return {name.removeprefix(f"{FOLDER}/").split("/")[0] for name in storage.names(FOLDER)}


def array(storage, step: int) -> str:
    """The name of the object that holds an array."""
    names = storage.names(f"{FOLDER}/{step}/params/ocdbt.process_0/d/")
    return max(names, key=lambda name: len(storage.objects[name].content))


def test_what_is_saved_is_restored_and_the_newest_and_every_mth_kept(storage):
    saving = save(10, 20, 25, 30, keep=2, keep_every=20)
    assert saving.steps() == [20, 25, 30] and folders(storage) == {"20", "25", "30"}
    again = checkpoints()
    assert restored(again) == 30 and restored(again, 20) == 20 and again.metadata(25) == {"step": 25}
    manifest = json.loads(storage.objects[f"{FOLDER}/30/manifest.json"].content)
    assert manifest["digest"] == "md5"
    names = {name.removeprefix(f"{FOLDER}/30/") for name in storage.names(f"{FOLDER}/30/")}
    assert manifest["files"].keys() == names - {"manifest.json"}
    assert checkpoints(keep=1).restore({"params": {"w": jnp.zeros(512)}}, 25, read_only=True)[0] == 25


def test_nothing_saved_is_none(storage):
    assert checkpoints().steps() == [] and restored(checkpoints()) is None
    assert not any(request.startswith(("POST", "DELETE")) for request in storage.requests)


def other_content(storage, name):
    content = bytearray(storage.objects[name].content)
    content[len(content) // 2] ^= 1
    storage.put(name, content)


def shorter(storage, name):
    storage.put(name, storage.objects[name].content[:-1])


def missing(storage, name):
    del storage.objects[name]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (other_content, "params/.* has other content than was written"),
        (shorter, r"params/.* has \d+ bytes, \d+ were written"),
        (missing, "params/.* is missing"),
    ],
)
def test_a_damaged_newest_is_reported_and_moved_aside(storage, caplog, damage, reason):
    save(10, 20).close()
    damage(storage, array(storage, 20))
    assert restored(checkpoints(), read_only=True) == 10 and folders(storage) == {"10", "20"}
    with pytest.raises(CheckpointError, match=f"step 20 .*{reason}"):
        restored(checkpoints(), 20)
    before = {name: storage.objects[name].content for name in storage.names(f"{FOLDER}/20/")}
    caplog.clear()
    saving = checkpoints()
    assert restored(saving) == 10 and folders(storage) == {"10", "damaged-20"}
    assert [record.levelno for record in caplog.records if record.name == "jmoe"] == [logging.WARNING] * 2
    for name, content in before.items():
        assert storage.objects[name.replace("/20/", "/damaged-20/")].content == content
    saving.save(20, items(20), metadata={})
    saving.close()
    assert restored(checkpoints()) == 20


def test_where_none_is_good_it_refuses(storage):
    save(10, 20).close()
    for step in (10, 20):
        other_content(storage, array(storage, step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of the checkpoints in gs://.* is good.*step 20: .*step 10"):
            restored(checkpoints())
    assert folders(storage) == {"10", "20"}


def test_a_storage_that_does_not_answer_is_not_damage(storage, caplog):
    save(10, 20).close()

    for part in ("manifest.json", "/o"):  # a file; a list of files

        def refuse(request, part=part):
            if request.endswith(part):
                raise storage.Refused(403)

        storage.before = refuse
        with pytest.raises(CheckpointError, match="^gs://bucket/runs/x/checkpoints.* cannot be used: Forbidden: "):
            restored(checkpoints())
        storage.before = lambda request: None
        assert folders(storage) == {"10", "20"}
    assert "damaged" not in caplog.text


def test_a_manifest_of_sha256_is_checked_by_reading(storage, tmp_path):
    """A run that was trained on a disk and copied."""
    local = Checkpoints(tmp_path, keep=1)
    local.save(10, items(10), metadata={})
    local.close()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            storage.put(f"{FOLDER}/{path.relative_to(tmp_path)}", path.read_bytes())
    assert restored(checkpoints()) == 10
    other_content(storage, array(storage, 10))
    with pytest.raises(CheckpointError, match="params/.* has other content than was written"):
        restored(checkpoints())


def test_a_save_without_its_manifest_is_told_and_the_next_works(storage):
    def refuse(request):
        if request.startswith("POST") and f"{FOLDER}/20/items.json" in storage.objects:
            raise storage.Refused(403)

    saving = save(10)
    storage.before = refuse
    saving.save(20, items(20), metadata={})
    with pytest.raises(CheckpointError, match="saving step 20 to gs://.*/20 failed: .* cannot be used: Forbidden"):
        saving.wait()
    storage.before = lambda request: None
    saving.save(30, items(30), metadata={})
    saving.close()
    assert saving.steps() == [10, 30] and restored(checkpoints()) == 30


def test_killed_at_any_moment_it_can_be_restored(storage):
    """A save that removes an older one: whatever the bucket holds on the way is what a kill would leave."""
    save(1, 2, keep=2).close()
    moments = []

    def remember(request):
        if not request.startswith("GET"):
            moments.append(dict(storage.objects))

    storage.before = remember
    save(3, keep=2).close()
    storage.before = lambda request: None
    found = []
    for moment in [*moments, dict(storage.objects)]:
        storage.objects.clear()
        storage.objects.update(moment)
        there = checkpoints(keep=2)
        at = restored(there, read_only=True)
        assert restored(there) == at
        found.append(at)
        assert folders(storage) in ({"1", "2"}, {"2", "3"}, {"1", "2", "3"})
        there.save(4, items(4), metadata={})
        there.close()
        assert there.steps() == [at, 4] and folders(storage) == {str(at), "4"}
    assert found == sorted(found) and found.count(3) > 10 and found.count(2) > 10
