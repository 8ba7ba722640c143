"""Trains a model: `python train.py [RECIPE] [--flag value ...]`; `--help` lists the flags.

The same command with the same run directory goes on where it was. `--decay-from RUN@STEP` begins with a checkpoint of
another run, in its stable phase, and lets the learning rate decay from there. Exit codes: 0 the run is complete,
1 training failed, 2 bad input, 75 stopped by SIGTERM or Ctrl-C after saving: the same command goes on.
"""

import contextlib
import logging
import signal
import sys
import threading
from dataclasses import dataclass
from functools import partial

import jax

from jmoe import branch, distributed, recipe, sharding, training
from jmoe.allocator import keep_freed_memory
from jmoe.checkpoint import CheckpointError, Checkpoints
from jmoe.config import InputError, require
from jmoe.data import tokenizer
from jmoe.data.pipeline import train_batches, validation_batches
from jmoe.data.prepare import prepare
from jmoe.distributed import AnyProcess, Distributed, together
from jmoe.evaluation.perplexity import evaluate
from jmoe.evaluation.routing_figure import plot_routing
from jmoe.evaluation.routing_table import routing_table
from jmoe.language_model import LanguageModel, check_start, check_vocabulary, read_parameters
from jmoe.metrics import RunLog, last_step, last_validation
from jmoe.model.expert_parallel import check_experts
from jmoe.optim import roles
from jmoe.run_directory import RunDirectory, check_fingerprints, check_resume, source_fingerprints
from jmoe.telemetry import describe_model

log = logging.getLogger("jmoe")

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run again


@dataclass(frozen=True)
class Options:
    """Flags of this script that are not part of the run's config."""

    allow_learning_rate_change: bool = False
    """go on with another learning rate or schedule than the run began with [switch]"""
    init_from: str | None = None
    """a run whose newest parameters a new run begins with; steps, optimiser and data begin anew [path]"""
    print_sharding: bool = False
    """print how the mesh splits each parameter, and end [switch]"""
    print_optimizer: bool = False
    """print what the optimiser does with each parameter, and end [switch]"""
    distributed: Distributed = Distributed()
    """the processes of several hosts, each with the same command"""


class TrainingError(RuntimeError):
    """Training that cannot go on, told in one line."""


def main(argv: list[str]) -> int:
    keep_freed_memory()
    _, config, options = recipe.parse(argv, Options(), default="configs/tiny.py")
    config = branch.resolve(config)
    assert config.run_dir is not None  # `parse` fills it in
    distributed.start(options.distributed)
    if options.print_sharding:
        mesh = sharding.make_mesh(config.mesh)
        state_shape = training.abstract_state(config, mesh)
        print(sharding.sharding_table(state_shape.params, mesh))
        sharding.check_divisible(state_shape.params, mesh)
        return 0
    if options.print_optimizer:
        print(roles.table(config.optim, jax.eval_shape(partial(training.init_state, config)).params))
        return 0
    with RunDirectory.open(config.run_dir) as run, contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(run.checkpoints, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
        stack.enter_context(contextlib.closing(checkpoints))
        # 1. Devices, model and text must fit together; all of it is known before anything is compiled.
        with together(InputError):  # what one process lacks, no other waits for
            mesh = sharding.make_mesh(config.mesh)
            host, hosts = sharding.host_share(mesh)
            sharding.check_batch(config.batch_size, config.accumulation, mesh)
            check_experts(config, mesh)
            state_shape = training.abstract_state(config, mesh)
            sharding.check_divisible(state_shape.params, mesh)
            earlier = run.read_config()
            if earlier is None:
                branch.check(config, allow_learning_rate=options.allow_learning_rate_change)
            else:
                earlier = recipe.from_dict(earlier)
                was, now = recipe.to_dict(earlier), recipe.to_dict(config)
                check_resume(was, now, allow_learning_rate=options.allow_learning_rate_change)
            text = tokenizer.load(config.data)
            check_vocabulary(text, config)
            if options.init_from is not None and not checkpoints.steps():  # a run that goes on is its own start
                check_start(options.init_from, config, text)
            train_data, validation_data = prepare(config.data, text, "train"), prepare(config.data, text, "validation")
        fingerprints = {
            "tokenizer": text.fingerprint,
            **source_fingerprints("train", (source.fingerprint for source in train_data)),
            **source_fingerprints("validation", (source.fingerprint for source in validation_data)),
        }
        distributed.check_same("configuration and text", [recipe.to_dict(config), fingerprints])

        # 2. Resume, or begin, be it where another run stood.
        wanted, origin = training.checkpoint_items(state_shape, fingerprints), branch.Origin.of(config)
        restored = checkpoints.restore(wanted)
        if restored is None:
            if earlier is not None:  # a first save that was cut off: any later save begins when the first is complete
                reached = last_step(run.metrics)
                if reached > (origin.step if origin else 0) + 2 * earlier.checkpoint.every:
                    raise CheckpointError(
                        f"{run.path / run.metrics.name} goes up to step {reached}, but {run.checkpoints} holds no "
                        f"checkpoint; bring it back, or give another --run-dir to begin anew"
                    )
                log.warning("%s holds no checkpoint, so the run begins anew", run.path)
            restored = origin and origin.restore(wanted)
        if restored is None:
            given = None if options.init_from is None else read_parameters(options.init_from, state_shape.params)[1]
            state = training.create_state(config, mesh)
            if given is not None:
                state = training.begin_with(state, given)
        else:
            state, trained_on = training.from_checkpoint(restored[1])
            check_fingerprints(trained_on, fingerprints)
        first = int(state.step)
        require(
            first <= config.steps, f"the run in {run.path} has taken {first} steps; --steps {config.steps} is too few"
        )
        if run.is_writer:
            run.write_config(recipe.to_dict(config))
            text.save(run.tokenizer)
        run.upload()
        branched = f", branched from {config.decay_from}" if origin else ""
        print(f"run directory {run.path}, {first} of {config.steps} steps taken{branched}")
        print(describe_model(config.model))

        # 3. Train. The device is given a step before the one before it is reported, so that it never waits.
        train_step, eval_step = training.make_train_step(config, mesh), training.make_eval_step(config, mesh)
        batches = train_batches(
            train_data,
            batch_size=config.batch_size,
            seq_len=config.data.seq_len,
            seed=config.seed,
            start_step=first,
            workers=config.data.workers,
            host=host,
            hosts=hosts,
        )
        stack.enter_context(contextlib.closing(batches))
        run_log = stack.enter_context(contextlib.closing(RunLog(run, config, first)))
        metadata = {"config": recipe.to_dict(config), "fingerprints": fingerprints}
        stop_requested, on_any_process = stack.enter_context(stop_signals()), AnyProcess()

        def report(step, metrics):
            values = training.describe(config, metrics)
            run_log.train(step, values)
            if values["skipped_in_a_row"] >= config.max_skipped:
                checkpoints.wait()
                saved = checkpoints.steps()
                good = f"that of step {saved[-1]} in {run.checkpoints}" if saved else "none: no step was saved yet"
                raise TrainingError(
                    f"step {step}: the gradients of {values['skipped_in_a_row']} steps in a row were not finite "
                    f"(max_skipped = {config.max_skipped}); the last good checkpoint is {good}"
                )

        unreported = None
        for step in range(first + 1, config.steps + 1):
            state, metrics = train_step(state, training.put_batch(next(batches), mesh))
            if unreported:
                report(*unreported)
            unreported = step, metrics
            last, stopping = step == config.steps, on_any_process(stop_requested.is_set())
            validating = last or step % config.evaluation.every == 0
            saving = last or step % config.checkpoint.every == 0 or stopping
            if validating or saving:  # what a step logs is written before it is saved
                report(*unreported)
                unreported = None
            if validating:
                limit = config.evaluation.final_batches if last else config.evaluation.batches
                held_out = partial(
                    validation_batches,
                    validation_data,
                    batch_size=config.batch_size // config.accumulation,  # what fits in memory
                    seq_len=config.data.seq_len,
                    limit=limit and limit * config.accumulation,
                    host=host,
                    hosts=hosts,
                )
                values = evaluate(eval_step, state.params, held_out(), validation_data, config, mesh)
                if state.ema is not None:
                    average = evaluate(eval_step, state.ema, held_out(), validation_data, config, mesh)
                    values |= {f"ema_{name}": average[name] for name in ("loss", "bits_per_byte")}
                run_log.validation(step, values)
                if run.is_writer:
                    plot_routing(run.metrics, run.routing)
            if validating or saving:
                run.upload()
            if saving:
                items = training.checkpoint_items(state, fingerprints)
                checkpoints.save(step, items, metadata=metadata)
            if stopping and not last:
                checkpoints.wait()
                run_log.close()
                print(f"stopped by a signal; step {step} is saved, the same command goes on")
                return STOPPED
        checkpoints.wait()
        run_log.close()

        # 4. Report. All processes write the sample: it takes them all to hold the model.
        sample = LanguageModel(config, state.params, text, config.steps).generate("", max_new_tokens=200)
        if not run.is_writer:
            return 0
        final = last_validation(run.metrics)
        print(f"\nrun directory    {run.path}")
        print(f"validation loss  {final['loss']:.4f} nats/token (unigram entropy {final['unigram_entropy']:.4f})")
        print(f"                 {final['bits_per_byte']:.4f} bits/byte, over {final['tokens']:,} tokens")
        if run_log.tokens_per_second:
            print(f"speed            {run_log.tokens_per_second:,.0f} tokens/s")
        if skipped := int(state.skipped_total):
            print(f"skipped steps    {skipped}, for gradients that were not finite")
        print(routing_table(final))
        print(f"\na sample:\n\n{sample}")
    return 0


@contextlib.contextmanager
def stop_signals():
    """An event that SIGTERM and the first Ctrl-C set, so that the loop saves and ends; a second Ctrl-C interrupts."""
    requested = threading.Event()

    def request(number, _):
        requested.set()
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requested
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    log.setLevel(logging.INFO)
    with recipe.exit_on_input_error():
        try:
            code = main(sys.argv[1:])
        except (CheckpointError, TrainingError) as error:
            sys.exit(f"error: {error}")
    sys.exit(code)
