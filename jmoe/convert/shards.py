"""Safetensors files, read and written tensor by tensor.

A file is 8 bytes with the length of its header (little endian), the header, a JSON object
{name: {"dtype", "shape", "data_offsets"}}, and the tensors' bytes, one after another without holes
(huggingface.co/docs/safetensors). Models of several files have an index beside them that says which tensor is where.
"""

import json
import math
import os
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jmoe.config import InputError, require

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


class Tensor(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """of its bytes in the file [bytes]"""


class Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """The tensors of a folder: of model.safetensors, or of the files that model.safetensors.index.json names.

    All that can be known without reading the tensors is checked at once: that the files are there, in the folder
    itself, whole, and hold exactly what the index says. Raises InputError.
    """

    tensors: dict[str, Tensor]

    def __init__(self, folder: Path):
        index = folder / INDEX
        if not index.exists():
            require(
                (folder / SINGLE).is_file(), f"{folder} has neither {SINGLE} nor {INDEX}; other formats are not read"
            )
            self.tensors = read_header(folder / SINGLE)
            return
        weight_map = _json_object(index.read_bytes(), str(index)).get("weight_map")
        require(isinstance(weight_map, dict) and bool(weight_map), f"{index} has no weight_map")
        assert isinstance(weight_map, dict)
        for file in {str(file) for file in weight_map.values()}:
            plain = Path(file).name == file and file.endswith(".safetensors")
            require(plain, f"{index} names the file {file!r}; it must be a plain name that ends in .safetensors")
            require((folder / file).is_file(), f"{index} names the file {file}, which is not there")
        self.tensors = {}
        for file in sorted(set(weight_map.values())):
            found = read_header(folder / file)
            expected = {name for name, where in weight_map.items() if where == file}
            for name in sorted(expected ^ found.keys()):
                says = "has it there" if name in expected else "does not"
                holds = "holds" if name in found else "does not hold"
                raise InputError(f"{folder / file} {holds} the tensor {name}, and {INDEX} {says}")
            self.tensors |= found

    def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """The tensor, or the part tensor[index] of it, in the dtype of the file.

        Raises InputError if the file has become shorter than its header says.
        """
        tensor = self.tensors[name]
        shape, start = tensor.shape, tensor.start
        for i in index:
            shape = shape[1:]
            start += i * math.prod(shape) * tensor.dtype.itemsize
        size = math.prod(shape) * tensor.dtype.itemsize
        require(tensor.file.stat().st_size >= start + size, f"{tensor.file} ends within the tensor {name}")
        # Read, not mapped: what is then transposed lies in the cache.
        return np.fromfile(tensor.file, np.uint8, size, offset=start).view(tensor.dtype).reshape(shape)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises InputError if its header cannot be, or does not fit the file's size."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            whole = size >= 8 and length <= min(size - 8, _LONGEST_HEADER)
            require(whole, f"{file} is no safetensors file, or cut off within its header")
            header = _json_object(stream.read(length), f"the header of {file}")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
                raise ValueError("numbers must be integers that are not negative")
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{file}: the header's entry of the tensor {name} is not sound") from None
        require(
            entry.get("dtype") in DTYPES,
            f"{file}: the tensor {name} is {entry.get('dtype')}; only {', '.join(DTYPES)} are read",
        )
        dtype = DTYPES[entry["dtype"]]
        fits = end - start == math.prod(shape) * dtype.itemsize
        require(fits, f"{file}: {end - start} bytes are not what the tensor {name}, {entry['dtype']} {shape}, takes")
        tensors[name] = Tensor(file, dtype, shape, 8 + length + start)
        spans.append((start, end))
    reached = 0
    for start, end in sorted(spans):
        require(start == reached, f"{file}: there is a hole or an overlap at byte {reached} of its data")
        reached = end
    require(
        8 + length + reached == size,
        f"{file} has {size} bytes, and its header tells of {8 + length + reached}: it was cut off, or added to",
    )
    return tensors


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    require(isinstance(value, dict), f"{where} is no JSON object")
    return value


class Writer:
    """Writes tensors, from any thread and in any order, into model.safetensors, or into numbered files of at most
    `max_bytes` of data each and an index.

    Args:
      folder: which exists.
      plan: every tensor, in the order in which they are to stand in the files.
      max_bytes: the most data in a file; a single tensor that is larger gets a file of its own.
    """

    def __init__(self, folder: Path, plan: Iterable[Planned], max_bytes: int):
        self._folder, self._plan = folder, {planned.name: planned for planned in plan}
        shards: list[list[str]] = [[]]
        free = max_bytes
        for name, planned in self._plan.items():
            size = planned.nbytes
            if size > free and shards[-1]:
                shards.append([])
                free = max_bytes
            shards[-1].append(name)
            free -= size
        count = len(shards)
        files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)] if count > 1 else [SINGLE]
        self._left: dict[str, set[str]] = {}  # tensors that are still to come, by file
        self._places: dict[str, tuple[str, int]] = {}  # file of each tensor, and where it starts
        for file, names in zip(files, shards, strict=True):
            header = self._header(names)
            (folder / file).write_bytes(header)
            starts = accumulate((self._plan[name].nbytes for name in names), initial=len(header))
            self._places |= {name: (file, start) for name, start in zip(names, starts, strict=False)}
            self._left[file] = set(names)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes a tensor, rounded to the planned dtype. Raises ValueError if it is not in the plan, or is written."""
        planned, (file, start) = self._plan.get(name), self._places.get(name, ("", 0))
        if planned is None or planned.shape != tensor.shape or name not in self._left[file]:
            raise ValueError(f"{name} {tensor.shape} is given, and {planned} was planned, or is written already")
        content = contiguous(tensor.astype(planned.dtype, copy=False)).reshape(-1).view(np.uint8)
        with (self._folder / file).open("r+b") as stream:
            stream.seek(start)
            stream.write(content.data)
            stream.flush()
            self._left[file].remove(name)
            if not self._left[file]:  # two threads may find it so, which does no harm
                os.fsync(stream.fileno())

    def close(self) -> None:
        """Writes the index. Raises ValueError if tensors are missing."""
        if missing := [name for names in self._left.values() for name in names]:
            raise ValueError(f"{', '.join(missing[:5])} were not written")
        if len(self._left) > 1:
            total = sum(planned.nbytes for planned in self._plan.values())
            weight_map = {name: file for name, (file, _) in self._places.items()}
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    def _header(self, names: list[str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
        reached = 0
        for name in names:
            planned = self._plan[name]
            end = reached + planned.nbytes
            header[name] = {"dtype": _NAMES[planned.dtype], "shape": planned.shape, "data_offsets": [reached, end]}
            reached = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligned, so that the tensors can be mapped into memory
        return len(text).to_bytes(8, "little") + text


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order. A transposed matrix is copied a cache line at a time: 7 times as fast as NumPy."""
    if array.flags.c_contiguous:
        return array
    if array.ndim != 2 or not array.T.flags.c_contiguous:
        return np.ascontiguousarray(array)
    out, width = np.empty(array.shape, array.dtype), 64 // array.itemsize
    for start in range(0, array.shape[1], width):
        out[:, start : start + width] = array[:, start : start + width]
    return out
