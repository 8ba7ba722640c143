"""A run directory in a bucket is one process's at a time: while it renews its lock, and no longer."""

import os
import time

import pytest

from jmoe import lease
from jmoe.config import InputError
from jmoe.lease import Lease
from jmoe.run_directory import RunDirectory
from jmoe.storage import location

LOCK = "runs/x/lock"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.1)
    monkeypatch.setattr(lease, "EXPIRE", 0.6)


def held() -> Lease:
    return Lease(location(f"gs://bucket/{LOCK}"))


def dead(storage) -> None:
    """A lock that nobody renews."""
    storage.put(LOCK, b"process 1 on lost")


def test_it_is_ours_until_closed(storage):
    with RunDirectory.open("gs://bucket/runs/x") as run:
        assert str(run.path) == "gs://bucket/runs/x" and run.is_writer and storage.names() == [LOCK]
        message = rf"^run directory gs://bucket/runs/x is in use by process {os.getpid()} on .*; end that run first"
        with pytest.raises(InputError, match=message):
            RunDirectory.open("gs://bucket/runs/x")
        run.upload()
    assert storage.names() == []
    started = time.monotonic()
    RunDirectory.open("gs://bucket/runs/x").close()
    assert time.monotonic() - started < lease.EXPIRE / 2


def test_a_dead_holder_is_waited_for_and_then_taken_over(storage, caplog):
    dead(storage)
    started = time.monotonic()
    ours = held()
    assert time.monotonic() - started > lease.EXPIRE
    assert "was not renewed for" in caplog.text
    assert storage.objects[LOCK].content.startswith(b"process %d on " % os.getpid())
    ours.close()


def test_of_two_that_wait_for_a_dead_one_one_gets_it(storage):
    """Between the look at the dead one's lock and its removal another process takes over."""
    dead(storage)

    def overtake(request):
        if request == f"DELETE {LOCK}":
            storage.put(LOCK, b"process 2 on faster")

    storage.before = overtake
    with pytest.raises(InputError, match="is in use by process 2 on faster"):
        held()
    assert storage.objects[LOCK].content == b"process 2 on faster"


def test_one_that_is_renewed_at_the_last_moment_is_left(storage):
    dead(storage)

    def renew(request):
        if request == f"DELETE {LOCK}":
            storage.answer("PATCH", f"/storage/v1/b/bucket/o/{LOCK.replace('/', '%2F')}", {}, {}, b"")

    storage.before = renew
    with pytest.raises(InputError, match="is in use by process 1 on lost"):
        held()


def test_who_was_taken_over_learns_of_it_and_leaves_the_lock(storage):
    run = RunDirectory.open("gs://bucket/runs/x")
    run.config.write_text("{}")
    storage.put(LOCK, b"process 2 on other")
    with pytest.raises(InputError, match="gs://bucket/runs/x is in use by another process now"):
        run.upload()
    with pytest.raises(InputError, match="in use by another process now"):
        run.close()
    assert storage.names() == [LOCK] and storage.objects[LOCK].content == b"process 2 on other"


def test_a_lock_that_could_not_be_renewed_for_a_moment_is_kept(storage):
    ours = held()

    def refuse(request):
        raise storage.Refused(403)

    storage.before = refuse
    time.sleep(3 * lease.RENEW)
    with pytest.raises(InputError, match="lock cannot be used: Forbidden"):
        ours.check()
    storage.before = lambda request: None
    ours.check()
    ours.close()
    assert storage.names() == []


def test_a_bucket_that_is_not_there(storage):
    with pytest.raises(InputError, match="run directory gs://other/x cannot be made: there is no such bucket"):
        RunDirectory.open("gs://other/x")
