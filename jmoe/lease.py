"""The lock of a run directory in a bucket: an object that its holder keeps renewing.

Object storage has no lock that ends with a process. It does have preconditions: an object is created only if there is
none, changed or removed only if it still is of a certain generation. So the holder creates the object and renews it
every `RENEW` seconds. Who finds it there watches it: once it is renewed it is in use; if nothing happens for `EXPIRE`
seconds its holder is dead, and the lock is taken over. No two clocks are compared.

A holder that could not renew for so long, though alive, learns of it when it next wants to write (`Lease.check`).
"""

import contextlib
import logging
import os
import socket
import threading
import time

from etils import epath

from jmoe.config import InputError
from jmoe.storage import gcs, reached

RENEW = 15.0  # seconds
EXPIRE = 60.0  # seconds

log = logging.getLogger("jmoe")


class Lease:
    """Makes a run directory this process's alone, until `close` or the end of the process.

    Raises InputError if another process has it, which takes `RENEW` seconds to tell; if that one is dead `EXPIRE`
    seconds pass.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self._generation = _take(path)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Renews it. Raises InputError if another process has taken it over, or the bucket cannot be reached."""
        try:
            with reached(self._path):
                _call("PATCH", self._path, ifGenerationMatch=self._generation, json={"metadata": {"at": time.ctime()}})
        except (FileNotFoundError, FileExistsError) as error:
            raise InputError(
                f"run directory {self._path.parent} is in use by another process now: this one did not renew its lock "
                f"for {EXPIRE:.0f} seconds"
            ) from error

    def close(self) -> None:
        """Lets another process have the directory at once."""
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(FileNotFoundError, FileExistsError), reached(self._path):
            _call("DELETE", self._path, ifGenerationMatch=self._generation)

    def _keep(self) -> None:
        while not self._closed.wait(RENEW):
            with contextlib.suppress(InputError):  # tried again, and told by `check` before anything is written
                self.check()


def _take(path: epath.Path) -> str:
    """The generation of the lock once this process holds it."""
    seen, since = None, 0.0
    while True:
        try:
            with reached(path):
                holder = f"process {os.getpid()} on {socket.gethostname()}"
                gcs().pipe_file(os.fspath(path), holder.encode(), mode="create")
                return str(_call("GET", path)["generation"])
        except FileNotFoundError as error:
            raise InputError(f"run directory {path.parent} cannot be made: there is no such bucket") from error
        except FileExistsError:
            pass
        with contextlib.suppress(FileNotFoundError, FileExistsError), reached(path):  # it went, or changed, meanwhile
            found = _call("GET", path)
            state = found["generation"], found["metageneration"]
            if seen is None:
                log.info("%s is there: waiting for its holder to renew it, or to be dead", path)
                seen, since = state, time.monotonic()
            elif state != seen:
                holder = gcs().cat_file(os.fspath(path)).decode(errors="replace")
                raise InputError(
                    f"run directory {path.parent} is in use by {holder}; end that run first, or give another --run-dir"
                )
            elif time.monotonic() - since > EXPIRE:
                log.warning("%s was not renewed for %.0f seconds, so its holder is dead", path, EXPIRE)
                _call("DELETE", path, ifGenerationMatch=state[0], ifMetagenerationMatch=state[1])
                continue
        time.sleep(RENEW / 5)


def _call(method: str, path: epath.Path, **options):
    """A request about the object; what it answers, if anything. FileExistsError where a precondition fails."""
    bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
    return gcs().call(method, "b/{}/o/{}", bucket, name, json_out=method != "DELETE", **options)
