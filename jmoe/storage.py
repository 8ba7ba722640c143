"""Where a run directory lies: a folder of a file system, or of a bucket of Google Cloud Storage, gs://BUCKET/PATH.

Object storage renames nothing and appends to nothing, and its folders are but the beginnings of names. But each object
is there in full or not at all, and the storage tells its size and MD5 along with its name.
"""

import base64
import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from etils import epath

from jmoe.config import InputError, require

AnyPath = Path | epath.Path

REMOVED = "removed-"


class File(NamedTuple):
    """What is known of a file without reading it."""

    size: int
    """bytes"""
    digest: str | None = None
    """hexadecimal, of the kind that its `Disk` or `Bucket` names"""


def location(path: str | os.PathLike[str]) -> AnyPath:
    """The path of a run directory, which may be gs://BUCKET/PATH; how Orbax reaches that is settled on the way.

    Raises InputError for another URL, or where the extra `gcs` is not installed.
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(text)
    require(
        text.startswith("gs://") and bool(text.removeprefix("gs://").strip("/")),
        f"run directory {text} must be a folder of a file system, or gs://BUCKET/PATH of Google Cloud Storage",
    )
    require(
        importlib.util.find_spec("gcsfs") is not None,
        f"run directory {text} needs the extra gcs: python -m pip install 'jmoe[gcs]'",
    )
    found = epath.Path(text)
    with reached(found):
        gcs()
    return found


def same_place(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths of run directories lead to the same."""
    found = [location(path) for path in (one, other)]
    return len({path.resolve() if isinstance(path, Path) else path for path in found}) == 1


@functools.cache
def gcs() -> Any:
    """The gcsfs file system, the one that Orbax uses by way of epath."""
    os.environ.setdefault("EPATH_USE_TF", "0")  # TensorFlow, if it is there, is another way to do the same
    import fsspec
    from fsspec.config import conf

    # A listing kept from earlier does not know of what TensorStore has written since, or another host.
    conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs", finalize_on_close=True)


@contextlib.contextmanager
def reached(path: AnyPath) -> Iterator[None]:
    """Makes an InputError of whatever keeps a bucket from being used, but for files that are missing or there."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, InputError):
        raise
    except Exception as error:  # gcsfs, aiohttp and google-auth each have their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{path} cannot be used: {reason}") from error


class Disk:
    """Folders of a file system."""

    digest = "sha256"
    renames = True

    def exists(self, file: Path) -> bool:
        """Whether there is such a file or folder."""
        return file.exists()

    def read(self, file: Path) -> bytes:
        """What is in a file. Raises FileNotFoundError."""
        return file.read_bytes()

    def hash(self, file: Path, kind: str) -> str:
        """A digest of what is in a file, hexadecimal."""
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, kind).hexdigest()

    def write(self, file: Path, content: bytes) -> None:
        """Writes a file so that it is there in full or as it was, whatever happens, and lasts."""
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        self.sync(file.parent)

    def sync(self, path: Path) -> None:
        """Flushes to the disk a file, or which files a folder holds."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def files(self, folder: Path) -> dict[str, File]:
        """All files below a folder by their relative path."""
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        return {name: File((folder / name).stat().st_size) for name in names}

    def folders(self, directory: Path) -> list[str]:
        """The names of the folders in a directory; none if there is no directory."""
        return [path.name for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []

    def move(self, folder: Path, target: Path) -> None:
        """Renames a folder."""
        folder.rename(target)

    def remove(self, folder: Path) -> None:
        """Removes a folder; renamed first, so that a kill in the middle leaves no half of it under its name."""
        if folder.exists():
            target = folder.with_name(f"{REMOVED}{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
            shutil.rmtree(target, ignore_errors=True)

    def remove_leftovers(self, directory: Path) -> None:
        """Removes what a process killed while saving or removing left behind."""
        for pattern in (f"{REMOVED}*", "*.orbax-checkpoint-tmp*"):
            for path in directory.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


class Bucket:
    """The same in a bucket. A folder is removed, half of it may be, while an object removed-NAME lies beside it."""

    digest = "md5"
    renames = False

    def exists(self, file: epath.Path) -> bool:
        try:
            with reached(file):
                gcs().info(os.fspath(file))
        except FileNotFoundError:
            return False
        return True

    def read(self, file: epath.Path) -> bytes:
        with reached(file):
            return gcs().cat_file(os.fspath(file))

    def hash(self, file: epath.Path, kind: str) -> str:
        with reached(file), gcs().open(os.fspath(file), "rb") as stream:
            return hashlib.file_digest(stream, kind).hexdigest()

    def write(self, file: epath.Path, content: bytes) -> None:
        with reached(file):
            gcs().pipe_file(os.fspath(file), content)

    def sync(self, path: epath.Path) -> None:
        """What has been written has been stored."""

    def files(self, folder: epath.Path) -> dict[str, File]:
        with reached(folder):
            found = gcs().find(os.fspath(folder), detail=True)
        above = len(os.fspath(folder).removeprefix("gs://")) + 1
        return {name[above:]: File(entry["size"], _md5(entry)) for name, entry in sorted(found.items())}

    def folders(self, directory: epath.Path) -> list[str]:
        found = self._entries(directory)
        removed = {name.removeprefix(REMOVED) for name in found if name.startswith(REMOVED)}
        return [name for name, kind in found.items() if kind == "directory" and name not in removed]

    def move(self, folder: epath.Path, target: epath.Path) -> None:
        """Copies within the bucket, then removes: cut off in between, both are there."""
        names = self.files(folder)
        with reached(folder), ThreadPoolExecutor(max_workers=16) as threads:
            for _ in threads.map(lambda n: gcs().cp_file(os.fspath(folder / n), os.fspath(target / n)), names):
                pass
        self.remove(folder)

    def remove(self, folder: epath.Path) -> None:
        marker = folder.with_name(f"{REMOVED}{folder.name}")
        if self.exists(folder):
            self.write(marker, b"")
            with reached(folder):
                gcs().rm(os.fspath(folder), recursive=True)
        with contextlib.suppress(FileNotFoundError), reached(folder):
            gcs().rm_file(os.fspath(marker))

    def remove_leftovers(self, directory: epath.Path) -> None:
        for name in self._entries(directory):
            if name.startswith(REMOVED):
                self.remove(directory / name.removeprefix(REMOVED))

    def _entries(self, directory: epath.Path) -> dict[str, str]:
        try:
            with reached(directory):
                found = gcs().ls(os.fspath(directory), detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: entry["type"] for entry in found}


def of(path: AnyPath) -> Any:
    """The `Disk` or `Bucket` that a path leads to."""
    return Disk() if isinstance(path, Path) else Bucket()


def _md5(entry: dict[str, Any]) -> str | None:
    """Hexadecimal; None for an object that was put together from several, which has none."""
    return base64.b64decode(entry["md5Hash"]).hex() if "md5Hash" in entry else None


class Mirror:
    """A folder of this machine for the small files of a run in a bucket. A file that has grown is uploaded as a whole.

    The folder goes when the process ends.
    """

    SUFFIXES: ClassVar = (".json", ".jsonl")

    def __init__(self, path: epath.Path):
        self.path = path
        self.folder = Path(tempfile.mkdtemp(prefix="jmoe-"))
        self._stored: dict[str, tuple[int, int]] = {}
        self._brought = False
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def download(self) -> None:
        """Brings the JSON files that lie in the run directory itself; once, since later ones are written here."""
        if self._brought:
            return
        self._brought = True
        try:
            with reached(self.path):
                for entry in gcs().ls(os.fspath(self.path), detail=True):
                    name = entry["name"].rpartition("/")[2]
                    if entry["type"] == "file" and name.endswith(self.SUFFIXES):
                        gcs().get_file(entry["name"], str(self.folder / name))
        except FileNotFoundError:  # a new run
            pass
        self._stored = self._stamps()

    def upload(self) -> None:
        """Stores the files that changed since they were last stored or brought."""
        for name, stamp in self._stamps().items():
            if self._stored.get(name) != stamp:
                with reached(self.path):
                    gcs().put_file(str(self.folder / name), os.fspath(self.path / name))
                self._stored[name] = stamp

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of every file."""
        stats = {name: (self.folder / name).stat() for name in Disk().files(self.folder)}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
