"""What a run tells while it goes: JSON lines, TensorBoard events, the progress bar, and `RunLog` over all of them."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from jmoe.config import Config, InputError
from jmoe.run_directory import RunDirectory

# Lists with a value for each layer; others have one for each of `moe_layers`.
OF_ALL_LAYERS = ("max_attention_logit_by_layer",)


class MetricsLog:
    """Append-only JSON lines, one object each, with a "step"; every line is flushed as it is written.

    Opening it for a run that goes on after `step` drops a torn last line and the lines of later steps: they are about
    to be written again. A run that starts anew passes -1. For the file to be the same whenever the process is killed,
    a step's lines must be written before its checkpoint, and must hold no wall-clock time.

    A float32 is written with the fewest digits that give it back; NaN and infinities, which JSON lacks, as the strings
    "NaN", "Infinity" and "-Infinity", which `float` reads.
    """

    def __init__(self, path: Path, step: int):
        path = Path(path)
        _drop_after(path, step)
        self._stream = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Appends `record`: "step" and values by name; numbers, strings, arrays and (nested) lists of them."""
        json.dump(plain(record), self._stream, allow_nan=False)
        self._stream.write("\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def plain(value: Any) -> Any:
    """`value` as JSON holds it: arrays become lists, numpy and jax scalars numbers."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str | None):
        return value
    if not isinstance(value, float):
        value = np.asarray(value)
        if value.ndim:
            return [plain(item) for item in value]
        # The shortest decimal of a narrow float gives it back when it is rounded to its width again.
        value = float(str(value)) if value.dtype.kind in "fV" else value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _drop_after(path: Path, step: int) -> None:
    """Rewrites the file without the lines after `step` and a torn last one; there in full or, if killed, as it was.

    Raises InputError for a line within that is no record.
    """
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with path.open("rb") as old, temporary.open("wb") as new:
        for number, line in enumerate(old, 1):
            if not line.endswith(b"\n"):
                break
            try:
                keep = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}, is not a record with a step: {line[:80]!r}") from error
            if keep:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)


class TensorBoard:
    """TensorBoard events of the records given to `MetricsLog`; events after `step` are purged."""

    def __init__(self, directory: Path, step: int):
        self._writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Writes every finite number of `record`, values by layer as one tag a layer: `experts_per_token/layer_3`.

        A layer's list of shares becomes a histogram over its indices 0, 1, .... Tags of another split than "train"
        start with its name.
        """
        split = record.get("split", "train")
        prefix = "" if split == "train" else f"{split}/"
        for tag, value in _by_tag(record).items():
            if value is None or isinstance(value, str) or not np.isfinite(value).all():
                continue
            if isinstance(value, list):
                self._histogram(prefix + tag, np.array(value), record["step"])
            else:
                self._writer.add_scalar(prefix + tag, float(value), record["step"])
        self._writer.flush()

    def _histogram(self, tag: str, shares: np.ndarray, step: int) -> None:
        index = np.arange(len(shares))
        self._writer.add_histogram_raw(
            tag,
            min=-0.5,
            max=len(shares) - 0.5,
            num=1,
            sum=float(shares @ index),
            sum_squares=float(shares @ index**2),
            bucket_limits=(index + 0.5).tolist(),
            bucket_counts=shares.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()


def _by_tag(record: dict[str, Any]) -> dict[str, Any]:
    """The values in a record by TensorBoard tag."""
    tagged = {}
    for name, value in record.items():
        if name in ("step", "split", "moe_layers"):
            continue
        if isinstance(value, list):
            layers = range(len(value)) if name in OF_ALL_LAYERS else record["moe_layers"]
            for index, item in zip(layers, value, strict=True):
                tagged[f"{name.removesuffix('_by_layer')}/layer_{index}"] = item
        else:
            tagged[name] = value
    return tagged


class Progress:
    """Progress of a training on standard output: a bar on a terminal, else a line for every logged step.

    Args:
      total: steps of the run.
      initial: steps done before this process began.
      tokens_per_step: for tokens/s.
    """

    def __init__(self, total: int, initial: int, tokens_per_step: int):
        self.total = total
        self.tokens_per_step = tokens_per_step
        self.tokens_per_second: float | None = None
        """over the steps since the last logged one; None until two updates are in, the first of which waits for the
        compiler"""
        self._stream = sys.stdout
        self._last: tuple[int, float] | None = None
        self._bar = None
        if self._stream.isatty():
            layout = "{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}{postfix}"
            self._bar = tqdm(
                total=total,
                initial=initial,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=layout,
                postfix="compiling]",
            )

    def update(self, step: int, metrics: dict[str, Any] | None = None) -> None:
        """Tells that `step` is done; with `metrics` (loss, learning_rate, experts_per_token, dropped_per_token,
        skipped) it is a logged step."""
        now = time.perf_counter()
        if self._last is None:
            self._last = step, now
        elif metrics is not None and step > self._last[0]:
            self.tokens_per_second = self.tokens_per_step * (step - self._last[0]) / (now - self._last[1])
            self._last = step, now
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if metrics is None:
            return
        left, figures = self._left(step), self._figures(metrics)
        skipped = "  skipped: gradients not finite" if metrics.get("skipped") else ""
        if self._bar is None:
            self.write(f"step {step:{len(str(self.total))}}/{self.total}  {figures}  {left:>7} left{skipped}")
        else:
            self._bar.set_postfix_str(f"{left} left]  {figures}{skipped}")

    def write(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int) -> str:
        if not self.tokens_per_second:
            return "?"
        return tqdm.format_interval((self.total - step) * self.tokens_per_step / self.tokens_per_second)

    def _figures(self, metrics: dict[str, Any]) -> str:
        parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
        if "learning_rate" in metrics:
            parts.append(f"lr {metrics['learning_rate']:.2e}")
        if "experts_per_token" in metrics:
            parts.append(f"{metrics['experts_per_token']:5.2f} experts/token")
        if metrics.get("dropped_per_token"):
            parts.append(f"{metrics['dropped_per_token']:.2g} dropped/token")
        speed = f"{self.tokens_per_second:,.0f}" if self.tokens_per_second else "-"
        return "  ".join([*parts, f"{speed:>9} tokens/s"])


class RunLog:
    """The log of one training process: records go to metrics.jsonl, TensorBoard and the terminal, and what the clock
    says to timing.jsonl.

    Args:
      run: the directory of the run; left alone if it is another process's to write to.
      config: of the run.
      step: steps taken before this process began.
    """

    def __init__(self, run: RunDirectory, config: Config, step: int):
        self._config = config
        # Of several hosts' processes one has the directory.
        self._records = [MetricsLog(run.metrics, step), TensorBoard(run.tensorboard, step)] if run.is_writer else []
        self._timing = [MetricsLog(run.timing, step)] if run.is_writer else []
        self._progress = Progress(config.steps, step, config.batch_size * config.data.seq_len)
        self._began = time.perf_counter()
        self._speeds: list[float] = []

    def train(self, step: int, values: dict[str, Any]) -> None:
        """Tells of a training step; logs every `log_every`-th, the last, and those that were skipped."""
        if step % self._config.log_every and step != self._config.steps and not values["skipped"]:
            self._progress.update(step)
            return
        self._progress.update(step, values)
        self._write({"step": step, "split": "train", **values})
        if speed := self._progress.tokens_per_second:
            self._speeds.append(speed)
            seconds = time.perf_counter() - self._began
            for log in self._timing:
                log.write({"step": step, "seconds": seconds, "tokens_per_second": speed})

    def validation(self, step: int, values: dict[str, Any]) -> None:
        """Logs a validation."""
        self._write({"step": step, "split": "validation", **values})
        loss, bits = values["loss"], values["bits_per_byte"]
        self._progress.write(f"step {step}  validation {loss:.4f} nats/token, {bits:.4f} bits/byte")

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the logged steps of this process; None if it took too few to tell."""
        return float(np.median(self._speeds)) if self._speeds else None

    def close(self) -> None:
        """Ends the bar and closes the files."""
        for part in (self._progress, *self._timing, *reversed(self._records)):
            part.close()

    def _write(self, record: dict[str, Any]) -> None:
        for log in self._records:
            log.write(record)


def last_validation(path: Path) -> dict[str, Any]:
    """The record of the last validation in a metrics.jsonl that holds one, its numbers as they were given."""
    with path.open() as lines:
        *_, last = (record for record in map(json.loads, lines) if record["split"] == "validation")
    return _numbers(last)


def _numbers(value: Any) -> Any:
    """The inverse of `plain` on what is not finite."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def last_step(path: Path) -> int:
    """The last step in a metrics.jsonl; 0 if there is none. A torn last line does not count."""
    if not path.exists():
        return 0
    with path.open() as lines:
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)
