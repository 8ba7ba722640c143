"""A folder that is there in full or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jmoe.checkpoint import CheckpointError
from jmoe.config import require
from jmoe.storage import Disk


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends, and is removed if the block fails.

    Raises InputError if there is something at `path` already, CheckpointError if the disk does not take it all.
    """
    check_new(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        Disk().sync(temporary)
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
        Disk().sync(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error.strerror or error}; nothing is left there"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(path: Path) -> None:
    """Raises InputError unless `path` is free to be made: an empty folder, or nothing."""
    free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    require(free, f"{path} is there already; give a folder that is not, or is empty")
