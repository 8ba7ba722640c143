"""The directory of one run: who may write to it, and whether a command may go on with what is in it.

runs/NAME/
    config.json     the resolved configuration
    metrics.jsonl   one object a line; timing.jsonl beside it holds the wall-clock figures
    tensorboard/    the same as events
    tokenizer.json  turns the run's tokens into text
    checkpoints/    see jmoe.checkpoint
    routing.png     see jmoe.evaluation.routing_figure
    lock            held by the process that trains

It may lie in a bucket, gs://BUCKET/runs/NAME. Nothing can be appended to there, so all but the checkpoints is written
on this machine, and uploaded before each save.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from jmoe import storage
from jmoe.config import InputError, require
from jmoe.distributed import together
from jmoe.lease import Lease

# Keys that may differ from those the run was started with: model, data and objective stay what they are. (More steps
# stretch a schedule that ends with them, and another mesh adds in another order.)
FREE = (
    *("steps", "log_every", "max_skipped", "remat", "run_dir"),
    *("checkpoint", "evaluation", "mesh", "data.workers", "data.cache_dir"),
)
LEARNING_RATE = ("optim.learning_rate", "optim.learning_rates", "optim.schedule")


class RunDirectory:
    """A run directory; one that was opened is this run's alone until it is closed, as a context manager does."""

    def __init__(self, path: str | os.PathLike[str], lock: TextIO | Lease | None = None):
        self.path = storage.location(path)
        self._mirror = None if isinstance(self.path, Path) else storage.Mirror(self.path)
        folder = self._mirror.folder if self._mirror else Path(self.path)
        self.config = folder / "config.json"
        self.metrics = folder / "metrics.jsonl"
        self.timing = folder / "timing.jsonl"
        self.tensorboard = folder / "tensorboard"
        self.tokenizer = folder / "tokenizer.json"
        self.routing = folder / "routing.png"
        self.checkpoints = self.path / "checkpoints"
        self._lock = lock

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "RunDirectory":
        """Creates the directory if need be and locks it. The lock ends with the process, however that ends; in a bucket
        a minute after one that was killed.

        Of several hosts' processes the first holds the lock, and writes; all have to call this.
        Raises InputError if the directory cannot be written to, another run has it, or a host lacks it.
        """
        with together(InputError):
            where = storage.location(path)
            if jax.process_index() > 0:
                run = cls(where)
            else:
                run = cls._locked(where) if isinstance(where, Path) else cls(where, Lease(where / "lock"))
        with together(InputError):
            require(
                storage.of(run.path).exists(run.path / "lock"),
                f"run directory {path} is not there on this host; it must lie on a file system that all hosts share",
            )
        return run

    @classmethod
    def _locked(cls, directory: Path) -> "RunDirectory":
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = (directory / "lock").open("a+")
        except OSError as error:
            raise InputError(f"run directory {directory} cannot be written to: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            if not isinstance(error, BlockingIOError):
                raise InputError(f"run directory {directory} cannot be locked: {error.strerror}") from error
            by = f" by process {holder}" if holder.isdecimal() else ""
            raise InputError(
                f"run directory {directory} is in use{by}; end that run first, or give another --run-dir"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        return cls(directory, lock)

    @property
    def is_writer(self) -> bool:
        """Whether it is for this process to write here: it has the lock."""
        return self._lock is not None

    def upload(self) -> None:
        """Stores in a bucket what was written here since the last time: before a step is saved, so that no step lacks
        the lines of metrics before it. All processes have to call this. A file system has them already.

        Raises InputError if the bucket cannot be written to, or another process has taken the run over.
        """
        if self._mirror:
            with together(InputError):
                self._upload()

    def _upload(self) -> None:
        if self._mirror and isinstance(self._lock, Lease):
            self._lock.check()
            self._mirror.upload()

    def close(self) -> None:
        """Lets another process have the directory."""
        try:
            self._upload()
        finally:
            if self._lock:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except InputError:
            if kind is None:  # else there is an error to tell already
                raise

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes config.json: there in full or, if the process is killed, as it was."""
        write_json(self.config, config)

    def read_config(self) -> dict[str, Any] | None:
        """What config.json holds, None if there is none. Raises InputError if it is not a JSON object."""
        if self._mirror:
            self._mirror.download()
        told = self.path / self.config.name
        try:
            config = json.loads(self.config.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{told} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"{told} is not JSON: {error}") from error
        require(isinstance(config, dict), f"{told} holds {type(config).__name__}; it must hold a JSON object")
        return config


def write_json(file: storage.AnyPath, content: Any) -> None:
    """Writes JSON so that the file is there in full or as it was, whatever happens, and lasts."""
    storage.of(file).write(file, (json.dumps(content, indent=2) + "\n").encode())


def check_resume(old: dict[str, Any], new: dict[str, Any], *, allow_learning_rate: bool = False) -> None:
    """Refuses to go on with a run of configuration `old` under `new`, both in JSON form.

    `FREE` keys may differ; learning rate and schedule may with `allow_learning_rate`. Raises InputError with a line
    and below it one indented line for each difference in the way.
    """
    changed = changes(old, new, (*FREE, *LEARNING_RATE) if allow_learning_rate else FREE)
    if not changed:
        return
    only_rate = all(_within(key, LEARNING_RATE) for key, _ in changed)
    ways = "--allow-learning-rate-change or another --run-dir" if only_rate else "another --run-dir"
    lines = "".join(f"\n  {key}: {text}" for key, text in changed)
    raise InputError(f"this command cannot go on with the run in its directory; give {ways}, or undo:{lines}")


def changes(old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...]) -> list[tuple[str, str]]:
    """The `differences` of two configurations in JSON form, but for the `free` keys and what stands below them."""
    return [(key, text) for key, text in differences(old, new) if not _within(key, free)]


def source_fingerprints(split: str, fingerprints: Iterable[str]) -> dict[str, str]:
    """The fingerprints of a split's sources, in order, under the names that `check_fingerprints` tells."""
    return {f"{split} source {number}": fingerprint for number, fingerprint in enumerate(fingerprints)}


def check_fingerprints(old: dict[str, str], new: dict[str, str]) -> None:
    """Refuses to go on with other data than the run has seen: fingerprints by name, for instance of the tokenizer.

    Raises InputError in the manner of `check_resume`.
    """
    lines = "".join(f"\n  {key}: {text}" for key, text in differences(old, new))
    if lines:
        raise InputError(f"the text or tokenizer on this machine is not what the run was trained on:{lines}")


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and description of each leaf in which two JSON values, a run's and a command's, differ."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if json.dumps(old) != json.dumps(new):
            yield key, f"run has {json.dumps(old)}, command says {json.dumps(new)}"
        return
    dot = f"{key}." if key else ""
    if old.get("kind") != new.get("kind"):  # members of a union: their fields are not comparable
        yield f"{dot}kind", f"run has {json.dumps(old.get('kind'))}, command says {json.dumps(new.get('kind'))}"
        return
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new:
            yield f"{dot}{name}", f"run has {json.dumps(old[name])}, command has no such entry"
        elif name not in old:
            yield f"{dot}{name}", f"run has no such entry, command says {json.dumps(new[name])}"
        else:
            yield from differences(old[name], new[name], f"{dot}{name}")
