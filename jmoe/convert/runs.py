"""The parameters of a run, read and written piece by piece."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from jmoe import config
from jmoe.data.tokenizer import Tokenizer


class Run:
    """A run's settings, tokenizer and the parameters of one of its checkpoints.

    Raises InputError if the directory is not that of a run or has no checkpoint, CheckpointError if none is good.
    """

    settings: config.Config
    tokenizer: Tokenizer
    step: int

    def __init__(self, run_dir: Path, step: int | None = None):
        raise NotImplementedError

    def read(self, parameter: str) -> np.ndarray:
        """A whole parameter, float32, under its name in `jmoe.checkpoint.flatten`."""
        raise NotImplementedError


def write_run(
    run_dir: Path, settings: config.Config, tokenizer: Tokenizer, parameter: Callable[[str], np.ndarray]
) -> None:
    """Makes a run directory that holds `settings`, the tokenizer, and the parameters as the checkpoint of step 0.

    `parameter` gives each by its name, float32 in jmoe's own shape; they are asked for one after another. The run can
    be evaluated, exported, and given to `train.py --init-from`. Nothing is left behind if it fails.
    Raises InputError if the directory exists and is not empty.
    """
    raise NotImplementedError
