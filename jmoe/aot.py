"""Compiles a recipe's train step for a TPU topology, with no TPU present, and tells what a step takes.

    python -m jmoe.aot configs/x.py --topology v5p:4x4x4 [--flag value ...] [--json] [--compilation-cache DIR]

It is the very step that train.py takes, with the recipe's flags. Exit codes: 0 it fits, 1 it does not fit the chip's
memory, 2 bad input, no libtpu among it (`pip install 'jmoe[tpu]'`).
"""

import dataclasses
import importlib.util
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import config, flops, hlo, recipe, sharding, training
from jmoe.batch import Batch
from jmoe.chips import CHIPS, Chip
from jmoe.config import InputError, require
from jmoe.model.expert_parallel import check_experts
from jmoe.ops import splash_attention
from jmoe.ops.grouped_matmul import megablox

KERNELS = {"splash": splash_attention.kernel_flops, "gmm": megablox.kernel_flops, "tgmm": megablox.kernel_flops}
"""FLOPs of the kernels by the beginning of their name"""


@dataclass(frozen=True)
class Options:
    """Flags of this command that are not part of the run's config."""

    topology: str = "v5p:2x2x1"
    """the chip and how many of it stand in each direction: v5e:4x4, v5p:4x4x4, v6e:8x8 [name]"""
    json: bool = False
    """print the report as JSON [switch]"""
    compilation_cache: str | None = None
    """keep the compiled program there, as JAX_COMPILATION_CACHE_DIR does for train.py [path]"""


@dataclass(frozen=True)
class Report:
    """What a step takes, per device."""

    topology: str
    devices: int
    mesh: dict[str, int]
    fits: bool
    hbm: float
    """[bytes], of the chip, or half a chip where that is a device"""
    memory: dict[str, float]
    """[bytes] by class"""
    refusal: str | None = None
    """the compiler's word, where it found that the program does not fit; the rest is then empty"""
    tokens: float = 0.0
    """of the batch, over the devices"""
    model_flops: float = 0.0
    """of `jmoe.flops`, over the devices: every slot of a token used, attention without a causal mask"""
    products: float = 0.0
    """FLOPs of XLA's matrix products"""
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    """FLOPs of Pallas kernels by name, of the tiles that they may visit"""
    claims: dict[str, float] = dataclasses.field(default_factory=dict)
    """the same by what kernels tell the compiler: grouped products each row once, attention nothing"""
    unknown_kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    """kernels whose FLOPs nobody tells: runs by name"""
    moved: dict[str, float] = dataclasses.field(default_factory=dict)
    """[bytes] received, by kind of collective"""
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    """how many of each kind run"""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """estimates by part, see `estimate`"""
    compile_seconds: float = 0.0

    @property
    def total_memory(self) -> float:
        """[bytes]"""
        return sum(self.memory.values())

    @property
    def compiled_flops(self) -> float:
        """Of matrix products, in kernels or not."""
        return self.products + sum(self.kernels.values())


def topology_devices(topology: str) -> tuple[list[Any], Chip]:
    """The devices of a topology such as v5p:4x4x4, and what each of them has.

    Raises InputError for a chip or an arrangement that libtpu does not know, or if libtpu is not there.
    """
    name, _, layout = topology.partition(":")
    require(name in CHIPS, f"--topology {topology}: no chip {name!r}; there are {', '.join(CHIPS)}")
    require(re.fullmatch(r"\d+(x\d+){1,2}", layout) is not None, f"--topology {topology}: it must be like v5p:4x4x4")
    require(importlib.util.find_spec("libtpu") is not None, "libtpu is not installed: pip install 'jmoe[tpu]'")
    # Without a TPU libtpu looks for one, and for the network's word on it, where these are not said. A training that
    # has libtpu loaded beside it is no hindrance.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        devices = list(topologies.get_topology_desc(topology, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology {topology}: {' '.join(str(error).split())}") from error
    parts = len(devices) / np.prod([int(size) for size in layout.split("x")])
    chip = CHIPS[name]
    return devices, Chip(*(float(value / parts) for value in chip[:-1]), clock=chip.clock)


def abstract_batch(settings: config.Config, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes, dtypes and shardings of a global batch."""
    shape, spread = (settings.batch_size, settings.data.seq_len), sharding.batch_sharding(mesh)
    dtypes = Batch(jnp.int32, jnp.int32, jnp.int32, jnp.int32, jnp.bool_)
    return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=spread) for dtype in dtypes))


def compile_step(settings: config.Config, mesh: jax.sharding.Mesh) -> Any:
    """The train step of a recipe, compiled for a mesh of TPUs that need not be there."""
    state, batch = training.abstract_state(settings, mesh), abstract_batch(settings, mesh)
    step = training.make_train_step(settings, mesh).jitted
    with jax.set_mesh(mesh):
        return step.trace(state, batch).lower(lowering_platforms=("tpu",)).compile()


def bytes_per_device(tree: Any) -> float:
    """Of a tree of shapes with shardings."""
    return float(sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def report(settings: config.Config, topology: str) -> Report:
    """Compiles the step and reads off what it takes. Raises InputError for input that cannot be."""
    devices, chip = topology_devices(topology)
    mesh = sharding.make_mesh(settings.mesh, devices)
    sharding.check_batch(settings.batch_size, settings.accumulation, mesh)
    check_experts(settings, mesh)
    state = training.abstract_state(settings, mesh)
    sharding.check_divisible(state.params, mesh)
    memory = {"parameters": bytes_per_device(state.params), "optimizer state": bytes_per_device(state.opt_state)}
    if state.ema is not None:
        memory["moving average"] = bytes_per_device(state.ema)
    basic = partial(Report, topology, mesh.size, {str(axis): size for axis, size in mesh.shape.items()})
    start = time.monotonic()
    try:
        program = compile_step(settings, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        (first, *_) = re.findall(r"Used \S+ of \S+ hbm[^\n]*?(?=\.\s|$)|Ran out of memory[^\n]*", str(error)) or ["?"]
        return basic(fits=False, hbm=chip.hbm, memory=memory, refusal=first)
    compile_seconds = time.monotonic() - start
    sizes = program.memory_analysis()
    memory["batch and padding"] = sizes.argument_size_in_bytes - sum(memory.values())
    # At the peak, which is what the compiler holds against the chip; its sum of temporaries counts gaps between them.
    memory["gradients and activations"] = float(sizes.peak_memory_in_bytes - sizes.argument_size_in_bytes)
    memory["program"] = float(sizes.generated_code_size_in_bytes)
    work = hlo.work(program.as_text(), KERNELS)
    tokens = settings.batch_size * settings.data.seq_len / mesh.size
    return basic(
        fits=bool(sum(memory.values()) <= chip.hbm),
        hbm=chip.hbm,
        memory=memory,
        tokens=tokens,
        model_flops=tokens * model_flops(settings),
        products=work.products,
        kernels=dict(work.kernels),
        claims=dict(work.claims),
        unknown_kernels=dict(work.unknown_kernels),
        moved=dict(work.moved),
        collectives=dict(work.collectives),
        seconds=estimate(work, chip),
        compile_seconds=compile_seconds,
    )


def model_flops(settings: config.Config) -> float:
    """FLOPs per token of a training step, were every slot of a token used, by experts of the mean width."""
    layers = [layer for layer in flops.feed_forwards(settings.model) if isinstance(layer, config.MoE)]
    widths = [layer.slots * sum(layer.expert_widths) / layer.num_experts for layer in layers]
    return flops.training_flops(settings.model, settings.data.seq_len, widths)


def estimate(work: hlo.Work, chip: Chip) -> dict[str, float]:
    """Seconds of a step by part: the compiler's own estimate for its fusions, the only one it gives; kernels at the
    chip's peak, collectives at that of its links. The parts may overlap or not: a step lies between the longest and
    their sum, if kernels and links reach their peaks."""
    return {
        "fusions": work.cycles / chip.clock,
        "kernels": sum(work.kernels.values()) / chip.flops,
        "collectives": sum(work.moved.values()) / chip.ici_bandwidth,
    }


def describe(report: Report) -> str:
    """The report as a table."""
    mesh = " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    lines = [f"{report.topology}: {report.devices} devices, {mesh}; all figures per device", ""]

    def table(title: str, rows: dict[str, float], unit: float, digits: int, suffix: str):
        lines.append(title)
        lines.extend(f"  {name:<28}{value / unit:>12,.{digits}f} {suffix}" for name, value in rows.items())

    rows = report.memory | ({} if report.refusal else {"peak": report.total_memory}) | {"the chip has": report.hbm}
    table("memory", rows, 2.0**30, 2, "GiB")
    if report.refusal:
        return "\n".join([*lines, f"  it does not fit: {report.refusal}"])
    lines.append("  it fits" if report.fits else "  it does not fit")
    rows = {"model": report.model_flops, "XLA's matrix products": report.products, **report.kernels}
    table(f"FLOPs of a step of {report.tokens:,.0f} tokens", rows, 1e12, 2, "TFLOP")
    lines.append(f"  {'compiled over model':<28}{report.compiled_flops / report.model_flops:>12.3f}")
    lines.extend(f"  {name} runs {runs:g} times, of FLOPs unknown" for name, runs in report.unknown_kernels.items())
    table("bytes received", report.moved, 1e9, 3, "GB")
    table("time estimates", report.seconds, 1e-3, 1, "ms")
    lines.append(f"compiled in {report.compile_seconds:.0f} s")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    _, settings, options = recipe.parse(argv, Options(), default="configs/tiny.py")
    jax.config.update("jax_platforms", "cpu")
    if options.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    result = report(settings, options.topology)
    print(json.dumps(asdict(result), indent=2) if options.json else describe(result))
    return 0 if result.fits else 1


if __name__ == "__main__":
    with recipe.exit_on_input_error():
        code = main(sys.argv[1:])
    sys.exit(code)
