"""What the train step takes on meshes of TPUs, from programs compiled with no TPU present (extra `tpu`).

    python -m benchmarks.mesh [--only fsdp expert mixtral depth scaling] [--json FILE]

fsdp, expert: a model of OLMoE's shape (16 layers, d 2048, 16 heads, 64 experts of width 1024, top-8, vocabulary 50304,
sequences of 4096, four for each device, everything recomputed, bfloat16) on four chips of v5p, beside what MaxText's
own ahead-of-time compilation of the same model says. Its FLOPs are what the compiler knows of: they leave out
attention's kernels, and have each row of the experts once; so do ours beside it. Memory is the compiler's peak.
mixtral: Mixtral-8x7B on 32 chips. depth: compile time of 32 layers over that of 4. scaling: the predicted step of
Mixtral-8x7B, four sequences for each device, on 64, 512 and 4096 chips. Each compiles for half a minute or so.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks.timing import Figure, report
from jmoe import aot, recipe
from jmoe.config import Config, Data, LayerGroup, Mesh, Model, MoE, TopK

RECIPES = Path(__file__).parents[1] / "configs"
MAXTEXT_TFLOP, MAXTEXT_GIB = 151.5, 26.8


def olmoe(mesh: Mesh, layers: int = 16) -> Config:
    """The model, for four devices."""
    experts = MoE(num_experts=64, d_ff=1024, router=TopK(8, renormalise=False))
    model = Model(
        vocab_size=50304,
        d_model=2048,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        qk_norm=False,
        tie_embeddings=False,
        layers=(LayerGroup((experts,), layers),),
    )
    return Config(model=model, data=Data(seq_len=4096), batch_size=16, dtype="bfloat16", remat="full", mesh=mesh)


def tera(of: aot.Report) -> float:
    """TFLOP of a step on a device as the compiler has it: without attention's kernels, and each row of experts once."""
    return (of.products + sum(of.claims.values())) / 1e12


def gibi(of: aot.Report) -> float:
    """GiB of a device at the peak."""
    return of.total_memory / 2**30


def moved(of: aot.Report, title: str) -> list[Figure]:
    """Bytes by kind of collective."""
    return [Figure(f"{title}: {kind} received", size / 1e9, "GB") for kind, size in sorted(of.moved.items())]


def fsdp() -> list[Figure]:
    """Parameters split over four devices, beside MaxText."""
    ours = aot.report(olmoe(Mesh(fsdp=4)), "v5p:2x2x1")
    return [
        Figure("fsdp 4: FLOPs", tera(ours), "TFLOP"),
        Figure("fsdp 4: FLOPs / MaxText's", tera(ours) / MAXTEXT_TFLOP, "x", "at most", 1.0),
        Figure("fsdp 4: memory", gibi(ours), "GiB"),
        Figure("fsdp 4: memory / MaxText's, unrolled", gibi(ours) / MAXTEXT_GIB, "x", "at most", 1.0),
        *moved(ours, "fsdp 4"),
    ]


def expert() -> list[Figure]:
    """Experts split over four devices, beside parameters split over four."""
    split, ours = (aot.report(olmoe(mesh), "v5p:2x2x1") for mesh in (Mesh(fsdp=4), Mesh(expert=4)))
    return [
        Figure("expert 4: FLOPs / fsdp 4's", ours.compiled_flops / split.compiled_flops, "x", "at most", 1.15),
        Figure("expert 4: memory / fsdp 4's", gibi(ours) / gibi(split), "x", "at most", 1.3),
        *moved(ours, "expert 4"),
    ]


def mixtral() -> list[Figure]:
    """Mixtral-8x7B on 32 chips, where MaxText's ran out of memory."""
    ours = aot.report(recipe.load(RECIPES / "mixtral_8x7b.py"), "v5p:2x4x4")
    return [
        Figure("mixtral_8x7b on 32 chips: memory / the chip's", ours.total_memory / ours.hbm, "x", "at most", 1.0),
        Figure("mixtral_8x7b on 32 chips: compiled / model FLOPs", ours.compiled_flops / ours.model_flops, "x"),
    ]


def depth() -> list[Figure]:
    """Seconds to compile, of more layers."""
    # The first compilation of a process also loads the compiler: it is left out.
    _, few, many = (aot.report(olmoe(Mesh(fsdp=4), layers), "v5p:2x2x1").compile_seconds for layers in (2, 4, 32))
    return [Figure("compile time, 32 layers / 4", many / few, "x", "at most", 1.3)]


def scaling() -> list[Figure]:
    """Weak scaling: fsdp over 64 chips, data over the rest. A step is predicted as the compiler's time for its fusions
    plus kernels at the chip's peak, then collectives at the peak of the links, all of them hidden or none."""
    figures = []
    for topology, chips in (("v5p:4x4x4", 64), ("v5p:8x8x8", 512), ("v5p:16x16x16", 4096)):
        settings = recipe.load(RECIPES / "mixtral_8x7b.py")
        mesh = Mesh(fsdp=64, data=chips // 64)
        seconds = aot.report(dataclasses.replace(settings, mesh=mesh, batch_size=4 * chips), topology).seconds
        work, links = seconds["fusions"] + seconds["kernels"], seconds["collectives"]
        figures.append(Figure(f"mixtral_8x7b on {chips} chips: step, collectives hidden", max(work, links), "s"))
        figures.append(Figure(f"mixtral_8x7b on {chips} chips: step, none hidden", work + links, "s"))
    return figures


PARTS: dict[str, Callable[[], list[Figure]]] = {part.__name__: part for part in (fsdp, expert, mixtral, depth, scaling)}


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    figures = [figure for name in args.only for figure in PARTS[name]()]
    report("train steps compiled for TPU, each figure of one device", figures, args.json)


if __name__ == "__main__":
    main()
