"""Export and import of a model of about 1 GB, beside copying the same files; and the most memory they take.

    python -m benchmarks.convert [--rounds 3] [--dtype float32] [--json FILE]

The checkpoint is one that training writes. All three end when the disk has everything. Memory is counted in a process
of its own, above what the process takes once everything is imported.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from benchmarks.timing import Figure, measure, median, ratio, report
from jmoe import recipe, sharding, training
from jmoe.checkpoint import Checkpoints
from jmoe.config import Config, Data, LayerGroup, Model, MoE, TopK
from jmoe.convert.exporting import Options, export
from jmoe.convert.importing import import_
from jmoe.data.tokenizer import byte_tokenizer
from jmoe.run_directory import RunDirectory

LAYER = MoE(num_experts=16, d_ff=1280, router=TopK(k=2))
MODEL = Model(
    8192, d_model=512, num_heads=8, num_kv_heads=8, head_dim=64, qk_norm=True, layers=(LayerGroup((LAYER,), 8),)
)
LARGEST = 8192 * 512 * 4  # bytes: the embedding
SHARD = 200  # 10^6 bytes


def make(run_dir: Path) -> None:
    """A run with a checkpoint of the model as it is initialised."""
    settings = Config(model=MODEL, data=Data(seq_len=512))
    with RunDirectory.open(run_dir) as run:
        run.write_config(recipe.to_dict(settings))
        byte_tokenizer().save(run.tokenizer)
        checkpoints = Checkpoints(run.checkpoints, keep=1)
        params = training.create_state(settings, sharding.make_mesh(settings.mesh)).params
        checkpoints.save(0, {"params": params}, metadata={})
        checkpoints.close()


def convert(what: str, source: Path, target: Path, dtype: str) -> None:
    """One of copy, export and import."""
    if what == "export":
        export(source, target, Options(dtype=dtype, max_shard_size=f"{SHARD}MB"))  # pyright: ignore[reportArgumentType]
    elif what == "import":
        import_(source, target)
    else:
        shutil.copytree(source, target)
        for file in target.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def megabytes(field: str) -> float:
    """A figure of this process, such as VmHWM, the most memory so far, from Linux [10^6 bytes]."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


def peak(what: str, *arguments: object) -> float:
    """The most memory that a conversion takes in a process of its own [10^6 bytes]."""
    command = [sys.executable, "-m", "benchmarks.convert", "--memory", what, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Export and import beside copying.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        what, source, target, dtype = options.memory
        jax.devices()
        Path("/proc/self/clear_refs").write_text("5")  # the most so far begins anew
        before = megabytes("VmHWM")
        convert(what, Path(source), Path(target), dtype)
        print(megabytes("VmHWM") - before)
        return
    with tempfile.TemporaryDirectory() as folder:
        run, hf, back = (Path(folder) / name for name in ("run", "hf", "back"))
        make(run)
        memory = {"export": peak("export", run, hf, options.dtype), "import": peak("import", hf, back, options.dtype)}
        size = sum(file.stat().st_size for file in hf.glob("*.safetensors"))
        fresh = (Path(folder) / str(number) for number in itertools.count())  # removing takes longer than writing
        programs = {
            "copy": lambda: convert("copy", hf, next(fresh), options.dtype),
            "export": lambda: convert("export", run, next(fresh), options.dtype),
            "import": lambda: convert("import", hf, next(fresh), options.dtype),
        }
        times = measure(programs, rounds=options.rounds)
    figures = [Figure("copying the files", median(times, "copy"), "s")]
    for what, most in memory.items():
        figures += [
            Figure(f"{what}: its speed over that of copying", 1 / ratio(times, what, "copy"), "x", "at least", 0.5),
            Figure(f"{what}: the most memory", most, "MB", "at most", 1.5 * SHARD + LARGEST / 1e6),
        ]
    report(f"{size / 1e9:.2f} GB of safetensors, {options.dtype}, shards of {SHARD} MB", figures, options.json)


if __name__ == "__main__":
    main()
