"""The parameters of a run, read and written piece by piece.

Orbax reads and writes trees as a whole. What it stores is one Zarr array for each leaf, all in one OCDBT database,
which TensorStore reads and writes in parts.
"""

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

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

ITEM = "params"
_PENDING = 1 << 26  # bytes written before what is under way has to be on its way to the disk


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
        self._folder = checkpoints.directory / str(found)
        stored, expected = json.loads((self._folder / ITEMS).read_bytes())[ITEM], _described(self.settings.model)
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


class ParameterWriter:
    """Writes the parameters of a new run, whole or in parts, in any order, from any thread."""

    def __init__(self, step_folder: Path, shapes: dict[str, tuple[int, ...]]):
        context = ts.Context({"file_io_sync": False})  # all is synchronised at the end
        opening = {}
        self._pending: deque[Any] = deque()  # what is under way, the oldest first, and how large it is
        self._bytes = 0
        self._lock = Lock()
        for name, shape in shapes.items():
            # A chunk is what is written at a time: a parameter that is stacked over layers comes layer by layer, and
            # experts one by one.
            apart = 2 if "/experts/" in name else 1 if name.startswith("layers/") else 0
            chunk = (1,) * apart + shape[apart:]
            opening[name] = ts.open(
                # Orbax takes a chunk that is not there, as zeros would not be, for a loss.
                {**_spec(step_folder, name), "store_data_equal_to_fill_value": True},
                context=context,
                create=True,
                delete_existing=True,
                dtype=ts.float32,
                shape=shape,
                chunk_layout=ts.ChunkLayout(chunk_shape=chunk),
            )
        self._stores = {name: future.result() for name, future in opening.items()}

    def write(self, parameter: str, index: tuple[int, ...], part: np.ndarray) -> None:
        """parameter[index] = part."""
        part = np.asarray(part, np.float32, order="C")  # which leaves scalars what they are
        with self._lock:
            self._pending.append((self._stores[parameter][index or ...].write(part), part.nbytes))
            self._bytes += part.nbytes
            while self._bytes > _PENDING:
                self._settle()

    def write_all(self, read: Callable[[str], np.ndarray]) -> None:
        """Writes every parameter, whole, as `read` gives it by its name."""
        for name in self._stores:
            self.write(name, (), read(name))

    def wait(self) -> None:
        """Waits until all is written. Raises OSError if it cannot be."""
        while self._pending:
            self._settle()

    def _settle(self) -> None:
        future, size = self._pending.popleft()
        self._bytes -= size
        try:
            future.result()
        except ValueError as error:  # TensorStore's errors of all kinds
            raise OSError(str(error)) from error


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
        step_folder = run.checkpoints / "0"
        # Orbax writes its own books, for a tree of the same names whose arrays are then made what they are to be.
        context = ocp.Context()
        context.array.saving.use_compression = False
        metadata = {"config": recipe.to_dict(settings), "fingerprints": {"tokenizer": tokenizer.fingerprint}}
        with context:
            tree = {name: np.zeros(1, np.float32) for name in shapes}
            ocp.save_checkpointables(str(step_folder.absolute()), {ITEM: tree}, custom_metadata=metadata)
        writer = ParameterWriter(step_folder, shapes)
        write(writer)
        writer.wait()
        seal(step_folder, {ITEM: _described(settings.model)})


def _described(model: config.Model) -> dict[str, str]:
    return {name: f"float32[{','.join(map(str, shape))}]" for name, shape in parameter_shapes(model).items()}


def _spec(step_folder: Path, parameter: str) -> dict[str, Any]:
    base = f"file://{(step_folder / ITEM).absolute()}/"
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{parameter}/"}}
