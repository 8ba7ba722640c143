"""The peer of `benchmarks.train_step`: Hugging Face's Mixtral in PyTorch, training in a process of its own.

The thread pools of PyTorch and JAX would fight over the cores if they shared a process. The process makes the model,
tries which of its implementations of the experts is fastest, says so, and then takes a step for each line it is sent.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

MISSING = [name for name in ("torch", "transformers") if find_spec(name) is None]


class Peer:
    """A training process; calling it takes a step and waits for the end.

    Args:
      precision: float32; autocast, that is bfloat16 arithmetic on float32 parameters; or bfloat16 throughout.
      shape: arguments of `MixtralConfig`, and `batch_size`.
      preload: a shared library to load first.
    """

    def __init__(self, precision: str, shape: dict[str, int], preload: Path | None = None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, precision, json.dumps(shape)],
            env=os.environ | ({"LD_PRELOAD": str(preload)} if preload else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.experts = self._receive()
        """the implementation of the experts that it found fastest"""

    def _receive(self) -> str:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise RuntimeError("the peer's process ended; its error is above")
        return line.strip()

    def __call__(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self._receive()

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def unlocked_mkl(folder: Path) -> Path | None:
    """Makes a library that, loaded first, has MKL take the paths it keeps for Intel's processors on any. None without a
    C compiler; no effect where PyTorch comes without MKL."""
    library, source = folder / "unlocked_mkl.so", "int mkl_serv_intel_cpu_true(void) { return 1; }"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", str(library)], input=source, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return library


def serve() -> None:
    """The process: trains, a step for each line of standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("precision", choices=("float32", "autocast", "bfloat16"))
    parser.add_argument("shape", type=json.loads)
    args = parser.parse_args()

    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    batch_size = args.shape.pop("batch_size")
    model = MixtralForCausalLM(MixtralConfig(**args.shape, use_cache=False))
    if args.precision == "bfloat16":
        model = model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.randint(args.shape["vocab_size"], (batch_size, args.shape["max_position_embeddings"]))
    arithmetic = torch.autocast("cpu", torch.bfloat16) if args.precision == "autocast" else nullcontext()

    def step():
        with arithmetic:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def seconds(experts):
        """The second of two steps: the first allocates."""
        model.set_experts_implementation(experts)
        step()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    # The third there is, batched_mm, copies an expert's weights for each token: 25 GB here.
    fastest = min(("eager", "grouped_mm"), key=seconds)
    model.set_experts_implementation(fastest)
    print(fastest, flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


if __name__ == "__main__":
    serve()
