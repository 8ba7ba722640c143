"""Safetensors files, read and written tensor by tensor.

A file is 8 bytes with the length of its header (little endian), the header, a JSON object
{name: {"dtype", "shape", "data_offsets"}}, and the tensors' bytes, one after another
(huggingface.co/docs/safetensors). Models of several files have an index beside them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """of its bytes in the file [bytes]"""


class Reader:
    """The tensors of a folder: model.safetensors, or the files that model.safetensors.index.json names.

    Everything that can be known without reading the tensors is checked at once. Raises InputError.
    """

    tensors: dict[str, Tensor]

    def __init__(self, folder: Path):
        raise NotImplementedError

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the dtype of the file (bfloat16 by ml_dtypes)."""
        raise NotImplementedError


class Writer:
    """Writes tensors into model.safetensors, or into numbered files with an index, of at most `max_bytes` each.

    `plan` lists name and shape of every tensor, in the order in which `write` gets them; all have one dtype.
    """

    def __init__(self, folder: Path, plan: Iterable[tuple[str, tuple[int, ...]]], dtype: np.dtype, max_bytes: int):
        raise NotImplementedError

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes the next tensor, rounded to the dtype. Raises ValueError if it is not the one that the plan says."""
        raise NotImplementedError

    def close(self) -> None:
        """Writes the index. Raises ValueError if tensors are missing."""
        raise NotImplementedError
