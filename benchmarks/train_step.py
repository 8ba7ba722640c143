"""Tokens per second of whole training steps on a CPU: ours, beside Hugging Face's Mixtral in PyTorch.

    python -m benchmarks.train_step [--only float32] [--rounds 7] [--json FILE]

The model has a vocabulary of 8192, d 512, and 8 layers of 8 heads and 16 experts of width 512, top-2; the dense model
has the same active FLOPs. The batch is 8 rows of 512 random tokens, the optimiser AdamW. Our step also clips the
gradient, checks it, balances the experts and gathers their statistics; the peer's does none of that.

The peer trains in processes of its own that take turns with ours. MKL, of which PyTorch's float32 products are made,
takes a slow path on processors that are not Intel's: the peer is measured as it installs, and with that lifted. Without
PyTorch and transformers (`pip install jmoe[bench]`) only our own figures are given.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from benchmarks.huggingface import MISSING, Peer, unlocked_mkl
from benchmarks.timing import Figure, measure, median, ratio, report
from jmoe import training
from jmoe.allocator import keep_freed_memory
from jmoe.batch import Batch
from jmoe.config import Config, Dense, FeedForward, LayerGroup, Mesh, Model, MoE, TopK
from jmoe.sharding import make_mesh

VOCAB, D, LAYERS, HEADS, EXPERTS, K, F, BATCH, LENGTH = 8192, 512, 8, 8, 16, 2, 512, 8, 512

OURS: dict[str, FeedForward] = {
    "MoE": MoE(num_experts=EXPERTS, d_ff=F, router=TopK(k=K)),
    "dense": Dense(d_ff=K * F),
}
# By our arithmetic: the precisions of the peer, and what our MoE is to reach of its tokens per second, as PyTorch
# installs and with MKL unlocked (None: not measured, 0: no target).
TARGETS: dict[Literal["float32", "bfloat16"], dict[str, tuple[float, float | None]]] = {
    "float32": {"float32": (1.8, 1.0)},
    "bfloat16": {"autocast": (1.4, 0.0), "bfloat16": (1.0, None)},
}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": K,
    "max_position_embeddings": LENGTH,
    "batch_size": BATCH,
}


def settings(feed_forward: FeedForward, dtype: Literal["float32", "bfloat16"]) -> Config:
    """The layers stand in the pattern, not in its repeats, and so are unrolled: from the stacked parameters of a scan
    XLA:CPU copies each layer's, and with it, 18 % of the step."""
    model = Model(
        vocab_size=VOCAB,
        d_model=D,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=D // HEADS,
        qk_norm=False,
        tie_embeddings=False,
        layers=(LayerGroup((feed_forward,) * LAYERS),),
    )
    return Config(model=model, batch_size=BATCH, dtype=dtype)


def our_step(config: Config) -> Callable[[], Any]:
    """A program that takes a training step, on rows of 512 random tokens."""
    mesh = make_mesh(Mesh(), jax.devices("cpu")[:1])
    tokens = np.random.default_rng(0).integers(VOCAB, size=(config.batch_size, LENGTH), dtype=np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    whole = np.ones_like(tokens)
    batch = training.put_batch(Batch(tokens, np.roll(tokens, -1, axis=1), whole, positions, whole.astype(bool)), mesh)
    state, step = training.create_state(config, mesh), training.make_train_step(config, mesh)

    def program():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics.scalars["loss"]

    return program


def compare(dtype: Literal["float32", "bfloat16"], rounds: int, unlock: Path | None) -> list[Figure]:
    """The figures of our models in one arithmetic, and of the peer's in those to compare with."""
    programs: dict[str, Any] = {name: our_step(settings(feed_forward, dtype)) for name, feed_forward in OURS.items()}
    targets = {"dense": 0.9}
    for precision, (installed, unlocked) in {} if MISSING else TARGETS[dtype].items():
        name = f"Hugging Face {precision}"
        programs[name], targets[name] = Peer(precision, SHAPE), installed
        if unlocked is not None and unlock is not None:
            name += ", MKL unlocked"
            programs[name], targets[name] = Peer(precision, SHAPE, unlock), unlocked
    times = measure(programs, rounds)
    figures = []
    for name, program in programs.items():
        of = f"{name} ({program.experts})" if isinstance(program, Peer) else f"our {name}"
        figures.append(Figure(f"{dtype}: {of}", BATCH * LENGTH / median(times, name), "tokens/s"))
        if isinstance(program, Peer):
            program.close()
    for name, target in targets.items():
        speed = ratio(times, name, "MoE")
        figures.append(Figure(f"{dtype}: our MoE / {name}", speed, "x", "at least" if target else "", target))
    return figures


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(TARGETS), help="one arithmetic")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_freed_memory()  # as train.py does
    if MISSING:
        print(f"{' and '.join(MISSING)} not installed (pip install jmoe[bench]): our own figures only")
    with tempfile.TemporaryDirectory() as folder:
        unlock = None if MISSING else unlocked_mkl(Path(folder))
        if unlock is None and not MISSING:
            print("no C compiler: Hugging Face is measured only as PyTorch installs")
        figures = [f for dtype in TARGETS if args.only in (None, dtype) for f in compare(dtype, args.rounds, unlock)]
    report("training step", figures, args.json)


if __name__ == "__main__":
    main()
