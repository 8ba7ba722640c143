"""The parameters of a run, read and written piece by piece.

Orbax reads and writes trees as a whole. What it stores is one Zarr array for each leaf: those of a training all in one
OCDBT database, those that are written here as plain files, and TensorStore reads a part of either.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from jmoe import config, recipe
from jmoe.checkpoint import ITEMS, Checkpoints, seal
from jmoe.config import InputError
from jmoe.convert.mapping import parameter_shapes
from jmoe.data.tokenizer import Tokenizer
from jmoe.folder import new_folder
from jmoe.language_model import describe_run
from jmoe.run_directory import RunDirectory
from jmoe.threads import THREADS

ITEM = "params"
_FILE = 1 << 26  # bytes of a parameter, above which each layer of it has a file


class Run:
    """A run's settings, tokenizer and the parameters of one of its checkpoints, which is read only.

    Raises InputError if the directory is not that of a run or has no checkpoint, CheckpointError if none is good.
    """

    def __init__(self, run_dir: Path, step: int | None = None):
        self.path = run_dir
        self.settings, self.tokenizer = describe_run(run_dir)
        checkpoints = Checkpoints(RunDirectory(run_dir).checkpoints, keep=1)
        found = checkpoints.find([ITEM], step, read_only=True)
        if found is None:
            raise InputError(f"{run_dir} has no checkpoint yet")
        self.step = found
        self._folder = Path(checkpoints.directory) / str(found)
        stored = json.loads((self._folder / ITEMS).read_bytes())[ITEM]
        expected = _described(parameter_shapes(self.settings.model))
        if stored != expected:
            differ = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
            raise InputError(f"step {found} in {run_dir} does not fit the run's config.json: {', '.join(differ[:5])}")
        # Mapped into memory, of a chunk only the part that is asked for is read.
        self._context = ts.Context({"file_io_mode": {"mode": "memmap"}})
        self._opened: dict[str, ts.TensorStore] = {}

    def read(self, parameter: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """parameter[index], float32, of the parameter with this name in `jmoe.checkpoint.flatten`."""
        if parameter not in self._opened:
            spec = _spec(self._folder, parameter)
            self._opened[parameter] = ts.open(spec, read=True, open=True, context=self._context).result()
        return np.asarray(self._opened[parameter][index or ...].read().result())


class Layout(NamedTuple):
    """How a parameter lies in files; all three have as many dimensions."""

    shape: tuple[int, ...]
    file: tuple[int, ...]
    """shape of what is in a file: the whole, or one of the layers that a large one is stacked over"""
    part: tuple[int, ...]
    """shape of what can be read by itself: one layer, one expert"""

    def key(self, row: int) -> str:
        """Path of the file that holds the parameter from this row on."""
        return "/".join(["c", *map(str, (row, *[0] * len(self.shape))[: len(self.shape)])])

    def table(self) -> bytes:
        """The end of each file: where the parts lie in it, and how large they are."""
        size, part = 4 * math.prod(self.file), 4 * math.prod(self.part)
        return np.array([[start, part] for start in range(0, size, part)], "<u8").tobytes()

    def metadata(self) -> dict[str, Any]:
        """Of an array in version 3 of Zarr with its sharding codec (zarr-specs.readthedocs.io)."""
        as_is = [{"name": "bytes", "configuration": {"endian": "little"}}]
        parts = {"chunk_shape": self.part, "codecs": as_is, "index_codecs": as_is, "index_location": "end"}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": self.shape,
            "data_type": "float32",
            "fill_value": 0.0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.file}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "sharding_indexed", "configuration": parts}],
        }


def layout(name: str, shape: tuple[int, ...]) -> Layout:
    """Of the parameter with this name."""
    stacked = int(name.startswith("layers/"))
    single = stacked if 4 * math.prod(shape) > _FILE else 0
    apart = 2 if "/experts/" in name else stacked
    return Layout(shape, (1,) * single + shape[single:], (1,) * apart + shape[apart:])


class ParameterWriter:
    """Writes the parameters of a new run, whole or in parts: those of one file in order, those of several in threads.

    What is written is hashed on the way. A complete file goes to the disk while others are written.
    """

    entries: dict[Path, tuple[int, str]]
    """size and SHA-256 of each file that is complete"""

    def __init__(self, step_folder: Path, shapes: Mapping[str, tuple[int, ...]], threads: ThreadPoolExecutor):
        """`step_folder` is one that Orbax wrote, with one element of each parameter; `threads` wait for the disk."""
        self.entries, self._folder = {}, step_folder / ITEM
        self._threads, self._flushing = threads, []
        self._layouts = {name: layout(name, shape) for name, shape in shapes.items()}
        self._begun: dict[Path, tuple[int, Any]] = {}  # how much of a file is written, and its hash
        for name, its in self._layouts.items():
            with (self._folder / name / "zarr.json").open("r+") as stream:
                json.dump(its.metadata(), stream)
                stream.truncate()
            for row in range(math.prod(its.shape[:1]) // math.prod(its.file[:1])):
                file = self._folder / name / its.key(row)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
                self._begun[file] = 0, hashlib.sha256()

    def file(self, parameter: str, index: tuple[int, ...]) -> Path:
        """The file that parameter[index] goes to, or begins in."""
        its = self._layouts[parameter]
        return self._folder / parameter / its.key(index[0] if index and its.file != its.shape else 0)

    def write(self, parameter: str, index: tuple[int, ...], part: np.ndarray) -> None:
        """parameter[index] = part. Raises ValueError if it is not what comes next in its file, OSError if the disk does
        not take it."""
        its, file = self._layouts[parameter], self.file(parameter, index)
        if its.file != its.shape:
            if not index:
                for row, of_row in enumerate(part):
                    self.write(parameter, (row,), of_row)
                return
            index = (0, *index[1:])
        content, before = np.ascontiguousarray(part, np.float32), 0
        for i, n in zip(index, its.file, strict=False):
            before = before * n + i
        start, digest = self._begun[file]
        if start != before * content.nbytes:
            raise ValueError(f"{parameter}{list(index)} does not come after the {start} bytes in {file}")
        end = start + content.nbytes
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(content.data)
            digest.update(content.data)
            self._begun[file] = end, digest
            if end == 4 * math.prod(its.file):
                stream.write(its.table())
                stream.truncate()
                digest.update(its.table())
                self.entries[file] = stream.tell(), digest.hexdigest()
        if file in self.entries:
            self._flushing.append(self._threads.submit(_flush, file))

    def write_all(self, read: Callable[[str], np.ndarray]) -> None:
        """Writes every parameter, whole, as `read` gives it by its name."""
        for name in self._layouts:
            self.write(name, (), read(name))

    def close(self) -> None:
        """Waits until all is on the disk. Raises ValueError if parts are missing, OSError if it does not take them."""
        for flushed in self._flushing:
            flushed.result()
        if missing := self._begun.keys() - self.entries.keys():
            raise ValueError(f"{min(missing)} is not complete")


def write_run(
    run_dir: Path, settings: config.Config, tokenizer: Tokenizer, write: Callable[[ParameterWriter], None]
) -> None:
    """Makes a run directory that holds `settings`, the tokenizer, and the parameters as the checkpoint of step 0.

    `write` is called with a writer, and gives it every part of every parameter. The run can be evaluated, exported,
    and given to `train.py --init-from`. If it fails, nothing is left behind.

    Raises InputError if the directory is there and not empty, CheckpointError if the disk does not take it all.
    """
    shapes = parameter_shapes(settings.model)
    with new_folder(run_dir) as folder:
        run = RunDirectory(folder)
        run.write_config(recipe.to_dict(settings))
        tokenizer.save(run.tokenizer)
        step_folder = Path(run.checkpoints) / "0"
        # Orbax writes its own books, for a tree of the same names whose arrays are then made what they are to be.
        context = ocp.Context()
        context.array.saving.use_compression = False
        context.array.saving.use_ocdbt = False
        metadata = {"config": recipe.to_dict(settings), "fingerprints": {"tokenizer": tokenizer.fingerprint}}
        with context, _silent("absl"):  # which warns that no database is written
            tree = {name: np.zeros((1,) * len(shape), np.float32) for name, shape in shapes.items()}
            ocp.save_checkpointables(str(step_folder.absolute()), {ITEM: tree}, custom_metadata=metadata)
        with ThreadPoolExecutor(THREADS) as threads:
            writer = ParameterWriter(step_folder, shapes, threads)
            write(writer)
            writer.close()
        seal(step_folder, {ITEM: _described(shapes)}, writer.entries)


@contextlib.contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Without the logger's warnings."""

    def severe(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logging.getLogger(logger).addFilter(severe)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(severe)


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _described(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    return {name: f"float32[{','.join(map(str, shape))}]" for name, shape in shapes.items()}


def _spec(step_folder: Path, parameter: str) -> dict[str, Any]:
    item = (step_folder / ITEM).absolute()
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}, "path": f"{parameter}/"}
    files = {"driver": "file", "path": f"{item / parameter}/"}
    return {"driver": "zarr3", "kvstore": database if (item / "manifest.ocdbt").exists() else files}
