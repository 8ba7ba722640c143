"""What the train step takes on meshes of TPUs, from programs compiled with no TPU present (extra `tpu`).

    python -m benchmarks.mesh [--only fsdp expert mixtral depth scaling unrolled] [--json FILE]

fsdp, expert: a model of OLMoE's shape (16 layers, d 2048, 16 heads, 64 experts of width 1024, top-8, vocabulary 50304,
sequences of 4096, four for each device, everything recomputed, bfloat16) on four chips of v5p, beside what MaxText's
own ahead-of-time compilation of the same model says. Its FLOPs are what the compiler knows of: they leave out
attention's kernels, and have each row of the experts once; so do ours beside it. Memory is the compiler's peak.
mixtral: Mixtral-8x7B on 32 chips. depth: compile time of 32 layers over that of 4. scaling: the predicted step of
Mixtral-8x7B, four sequences for each device, on 64, 512 and 4096 chips.
unrolled: Mixtral-8x7B on 32 chips with its layers one after another in the program in place of a loop; it runs only
when it is asked for, since its time to compile grows with them: --layers compiles fewer.

The eight programs of all parts but `unrolled` take about ten minutes of one core.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks.timing import Figure, report
from jmoe import aot, recipe
from jmoe.chips import CHIPS
from jmoe.config import Config, Data, LayerGroup, Mesh, Model, MoE, TopK

RECIPES = Path(__file__).parents[1] / "configs"
MAXTEXT_TFLOP, MAXTEXT_GIB = 151.5, 26.8
SIZES = {
    "v5p:4x4x4": Mesh(data=4, fsdp=16),
    "v5p:8x8x8": Mesh(data=8, fsdp=64),
    "v5p:16x16x16": Mesh(data=16, fsdp=256),
}
"""of the weak scaling: data along one side of the torus, fsdp along the other two. Along all three the compiler gathers
parameters by adding them up, each device's share into zeros, which moves twice the bytes"""


@functools.cache
def compiled(settings: Config, topology: str) -> aot.Report:
    """What a step takes. Parts that ask for the same program share it."""
    result = aot.report(settings, topology)
    groups = " + ".join(f"{group.repeats}" for group in settings.model.layers[:3])
    groups += " + ..." if len(settings.model.layers) > 3 else ""
    axes = " ".join(f"{axis} {size}" for axis, size in result.mesh.items() if size > 1)
    print(f"  {topology}, {axes}, layers {groups}: {result.compile_seconds:.0f} s to compile", flush=True)
    return result


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
    ours = compiled(olmoe(Mesh(fsdp=4)), "v5p:2x2x1")
    return [
        Figure("fsdp 4: FLOPs", tera(ours), "TFLOP"),
        Figure("fsdp 4: FLOPs / MaxText's", tera(ours) / MAXTEXT_TFLOP, "x", "at most", 1.0),
        Figure("fsdp 4: memory", gibi(ours), "GiB"),
        Figure("fsdp 4: memory / MaxText's, unrolled", gibi(ours) / MAXTEXT_GIB, "x", "at most", 1.0),
        *moved(ours, "fsdp 4"),
    ]


def expert() -> list[Figure]:
    """Experts split over four devices, beside parameters split over four."""
    split, ours = (compiled(olmoe(mesh), "v5p:2x2x1") for mesh in (Mesh(fsdp=4), Mesh(expert=4)))
    return [
        Figure("expert 4: FLOPs / fsdp 4's", ours.compiled_flops / split.compiled_flops, "x", "at most", 1.15),
        Figure("expert 4: memory / fsdp 4's", gibi(ours) / gibi(split), "x", "at most", 1.3),
        *moved(ours, "expert 4"),
    ]


def on_32_chips(ours: aot.Report, name: str) -> list[Figure]:
    """Whether Mixtral-8x7B fits."""
    if ours.refusal:
        print(f"  {ours.refusal}")
        return [Figure(f"{name}: fits", 0.0, "", "at least", 1.0)]
    return [
        Figure(f"{name}: memory", gibi(ours), "GiB"),
        Figure(f"{name}: memory / the chip's", ours.total_memory / ours.hbm, "x", "at most", 1.0),
        Figure(f"{name}: compiled / model FLOPs", ours.compiled_flops / ours.model_flops, "x"),
        *moved(ours, name),
    ]


def mixtral() -> list[Figure]:
    """Mixtral-8x7B on 32 chips, where MaxText's ran out of memory."""
    ours = compiled(recipe.load(RECIPES / "mixtral_8x7b.py"), "v5p:2x4x4")
    return on_32_chips(ours, "mixtral_8x7b on 32 chips")


def unrolled(layers: int) -> list[Figure]:
    """The same with the layers one after another, each a group of its own, as MaxText's were when it ran out."""
    settings = recipe.load(RECIPES / "mixtral_8x7b.py")
    model = dataclasses.replace(settings.model, layers=(LayerGroup(settings.model.layers[0].pattern),) * layers)
    ours = compiled(dataclasses.replace(settings, model=model), "v5p:2x4x4")
    name = f"mixtral_8x7b on 32 chips, {layers} layers unrolled"
    return [*on_32_chips(ours, name), Figure(f"{name}: compile time", ours.compile_seconds, "s")]


def depth() -> list[Figure]:
    """Seconds to compile, of more layers."""
    # The first compilation of a process also loads the compiler: the one of 16 layers, if no part before had it.
    _, few, many = (compiled(olmoe(Mesh(fsdp=4), layers), "v5p:2x2x1").compile_seconds for layers in (16, 4, 32))
    return [Figure("compile time, 32 layers / 4", many / few, "x", "at most", 1.3)]


def scaling() -> list[Figure]:
    """Weak scaling on paper: Mixtral-8x7B, 16,384 tokens for each chip, everything recomputed. It assumes
    - fusions take the compiler's own estimate, kernels (experts, attention) their FLOPs at the chip's peak;
    - collectives run at the peak of the links along two sides of three, where fsdp runs; all of them hide behind the
      work ("hidden"), or none does ("not hidden");
    - every expert gets equally many rows; no chip waits for text, for a slower one, or for a checkpoint;
    - one slice, so that no byte leaves the chips' own links."""
    figures = []
    for topology, mesh in SIZES.items():
        chips = mesh.data * mesh.fsdp
        settings = dataclasses.replace(recipe.load(RECIPES / "mixtral_8x7b.py"), mesh=mesh, batch_size=4 * chips)
        ours, name = compiled(settings, topology), f"mixtral_8x7b on {chips} chips"
        chip = CHIPS[topology.partition(":")[0]]
        work, links = ours.seconds["fusions"] + ours.seconds["kernels"], ours.seconds["collectives"] * 3 / 2
        figures += [
            Figure(f"{name}: memory", gibi(ours), "GiB"),
            Figure(f"{name}: fusions", ours.seconds["fusions"], "s"),
            Figure(f"{name}: kernels", ours.seconds["kernels"], "s"),
            *moved(ours, name),
            Figure(f"{name}: links", links, "s"),
        ]
        for overlap, step in (("hidden", max(work, links)), ("not hidden", work + links)):
            figures += [
                Figure(f"{name}: step, {overlap}", step, "s"),
                Figure(f"{name}: model FLOPs of the peak, {overlap}", ours.model_flops / chip.flops / step, "x"),
            ]
    return figures


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual: dict[str, Callable[[], list[Figure]]] = {of.__name__: of for of in (fsdp, expert, mixtral, depth, scaling)}
    parser.add_argument("--only", nargs="+", choices=(*usual, "unrolled"), default=list(usual))
    parser.add_argument("--layers", type=int, default=32, help="of the part `unrolled`")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    parts = usual | {"unrolled": functools.partial(unrolled, args.layers)}
    start, figures = time.monotonic(), []
    for name in args.only:
        print(f"\n{name}, after {time.monotonic() - start:.0f} s: {(usual.get(name) or unrolled).__doc__}", flush=True)
        found = parts[name]()
        report(f"{name}: train steps compiled for TPU, each figure of one device", found)
        figures += found
    if args.json:
        report("all parts", figures, args.json)


if __name__ == "__main__":
    main()
