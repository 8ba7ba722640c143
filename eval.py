"""Evaluates a run, or lets it write: `python eval.py RUN_DIR [--flag value ...]`; `--help` lists the flags.

The run's own config says all that is needed. Prints the figures and writes them to RUN_DIR/eval.json; with --prompt it
prints generated text instead. A model that one device cannot hold is spread by `--mesh.fsdp -1`; on several hosts each
runs the same command. Exit codes: 0 done, 1 no checkpoint can be used, 2 bad input.
"""

import logging
import sys
from dataclasses import dataclass, field

import jax

import jmoe
from jmoe import distributed, recipe, sharding, storage, training
from jmoe.allocator import keep_freed_memory
from jmoe.checkpoint import CheckpointError
from jmoe.config import InputError, Mesh, require
from jmoe.data.pipeline import validation_batches
from jmoe.data.prepare import prepare_held_out
from jmoe.distributed import Distributed, together
from jmoe.evaluation.perplexity import evaluate
from jmoe.evaluation.routing_table import routing_table
from jmoe.generate import Sampling
from jmoe.metrics import plain
from jmoe.run_directory import check_fingerprints, source_fingerprints, write_json

log = logging.getLogger("jmoe")


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    step: int | None = None
    """the checkpoint; the newest good one if None [steps]"""
    ema: bool = False
    """take the moving average of the parameters that the run kept (its config's `ema`) [switch]"""
    data: str | None = None
    """other text to evaluate on: a pattern of .txt and .jsonl files, each also .gz or .zst [path]"""
    batches: int | None = None
    """most batches to evaluate; the whole text if None [batches]"""
    batch_size: int | None = None
    """sequences a batch; the run's micro-batch if None [sequences]"""
    prompt: str | None = None
    """generate text that continues this one, instead of evaluating [text]"""
    max_new_tokens: int = 200
    """most tokens to generate [tokens]"""
    sampling: Sampling = Sampling(temperature=0.8, top_p=0.95)
    """how tokens are drawn"""
    mesh: Mesh = field(default_factory=Mesh)
    """the devices; not those of the training unless told so"""
    distributed: Distributed = Distributed()
    """the processes of several hosts, each with the same command"""

    def __post_init__(self):
        for name in ("batches", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")


def main(argv: list[str]) -> int:
    keep_freed_memory()
    run_dir, options = recipe.arguments(argv, Options(), name="RUN_DIR", meaning="the directory of a run")
    distributed.start(options.distributed)
    with together(InputError):
        mesh = sharding.make_mesh(options.mesh)
        host, hosts = sharding.host_share(mesh)
    run = jmoe.load(run_dir, step=options.step, ema=options.ema, mesh=mesh)
    if options.prompt is not None:
        text = run.generate(options.prompt, max_new_tokens=options.max_new_tokens, sampling=options.sampling)
        print(options.prompt + text)
        return 0

    settings, data = run.settings, run.settings.data
    batch_size = options.batch_size or settings.batch_size // settings.accumulation
    with together(InputError):
        sharding.check_batch(batch_size, 1, mesh)
        prepared = prepare_held_out(data, run.tokenizer, options.data)
    found = source_fingerprints("validation", (source.fingerprint for source in prepared))
    distributed.check_same("texts", found)
    if options.data is None:
        known = {name: own for name, own in found.items() if name in run.fingerprints}  # a converted run has none
        try:
            check_fingerprints(run.fingerprints, run.fingerprints | known)
        except InputError as error:
            log.warning("%s", error)
    batches = validation_batches(
        prepared, batch_size=batch_size, seq_len=data.seq_len, limit=options.batches, host=host, hosts=hosts
    )
    values = evaluate(training.make_eval_step(settings, mesh), run.params, batches, prepared, settings, mesh)
    which = f"step {run.step}" + ", moving average" * options.ema
    print(f"{run_dir}, {which}, {values['tokens']:,} tokens of {options.data or 'the held-out text'}")
    print(f"loss           {values['loss']:.4f} nats/token (unigram entropy {values['unigram_entropy']:.4f})")
    print(f"perplexity     {values['perplexity']:.3f}")
    print(f"bits per byte  {values['bits_per_byte']:.4f}")
    print(routing_table(values))
    described = {"step": run.step, "data": options.data, **({"ema": True} if options.ema else {}), **values}
    path = storage.location(run_dir) / "eval.json"
    with together(InputError):
        try:
            if jax.process_index() == 0:
                write_json(path, plain(described))
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error
    return 0


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    with recipe.exit_on_input_error():
        try:
            code = main(sys.argv[1:])
        except CheckpointError as error:
            sys.exit(f"error: {error}")
    sys.exit(code)
