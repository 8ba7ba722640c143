"""Trains a model: `python train.py [RECIPE] [--flag value ...]`; `--help` lists the flags.

The same command with the same run directory goes on where it was. Exit codes: 0 the run is complete, 1 training failed,
2 bad input, 75 stopped by SIGTERM or Ctrl-C after saving: the same command goes on.
"""

import contextlib
import json
import logging
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass

from jmoe import recipe, sharding, training
from jmoe.checkpoint import CheckpointError, Checkpoints
from jmoe.config import require
from jmoe.data import tokenizer
from jmoe.data.pipeline import train_batches, validation_batches
from jmoe.data.prepare import prepare
from jmoe.evaluation.perplexity import evaluate
from jmoe.evaluation.routing_report import plot_routing, routing_table
from jmoe.language_model import LanguageModel, check_vocabulary
from jmoe.metrics import MetricsLog, Progress, TensorBoard
from jmoe.run_directory import RunDirectory, check_fingerprints, check_resume

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run again


@dataclass(frozen=True)
class Options:
    """Flags of this script that are not part of the run's config."""

    allow_learning_rate_change: bool = False
    """go on with another learning rate or schedule than the run began with [switch]"""


class TrainingError(RuntimeError):
    """Training that cannot go on, told in one line."""


def main(argv: list[str]) -> int:
    _, config, options = recipe.parse(argv, Options(), default="configs/tiny.py")
    assert config.run_dir is not None  # `parse` fills it in
    with RunDirectory.open(config.run_dir) as run, contextlib.ExitStack() as closing:
        # 1. Devices, model and text must fit together; all of it is known before anything is compiled.
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(config.batch_size, config.accumulation, mesh)
        state_shape = training.abstract_state(config, mesh)
        sharding.check_divisible(state_shape.params, mesh)
        earlier = run.read_config()
        if earlier is not None:
            earlier = recipe.to_dict(recipe.from_dict(earlier))
            check_resume(earlier, recipe.to_dict(config), allow_learning_rate=options.allow_learning_rate_change)
        text = tokenizer.load(config.data)
        check_vocabulary(text, config)
        train_data, validation_data = prepare(config.data, text, "train"), prepare(config.data, text, "validation")
        fingerprints = {"tokenizer": text.fingerprint} | {
            f"source {i}": p.fingerprint for i, p in enumerate(train_data)
        }

        # 2. Resume, or begin.
        checkpoints = closing.enter_context(
            contextlib.closing(
                Checkpoints(run.checkpoints, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
            )
        )
        restored = checkpoints.restore(training.checkpoint_items(state_shape, fingerprints))
        if restored is not None:
            state, trained_on = training.from_checkpoint(restored[1])
            check_fingerprints(trained_on, fingerprints)
        else:
            state = training.create_state(config, mesh)
        first = int(state.step)
        require(
            first <= config.steps, f"the run in {run.path} has taken {first} steps; --steps {config.steps} is too few"
        )
        run.write_config(recipe.to_dict(config))
        text.save(run.path / "tokenizer.json")
        print(
            f"run directory {run.path}: {'resuming after' if first else 'beginning at'} step {first} of {config.steps}"
        )
        print(training.describe_model(config.model))

        # 3. Train.
        train_step = training.make_train_step(config, mesh)
        eval_step = training.make_eval_step(config, mesh)
        log = closing.enter_context(contextlib.closing(MetricsLog(run.metrics, first)))
        timing = closing.enter_context(contextlib.closing(MetricsLog(run.timing, first)))
        board = closing.enter_context(contextlib.closing(TensorBoard(run.path / "tensorboard", first)))
        progress = closing.enter_context(
            contextlib.closing(Progress(config.steps, first, config.batch_size * config.data.seq_len))
        )
        stop_requested = closing.enter_context(stop_signals())
        batches = closing.enter_context(
            contextlib.closing(
                train_batches(
                    train_data,
                    batch_size=config.batch_size,
                    seq_len=config.data.seq_len,
                    seed=config.seed,
                    start_step=first,
                    workers=config.data.workers,
                )
            )
        )
        began, speeds = time.perf_counter(), []

        def report(step, metrics):
            """Logs a step. Waits for it, so the step after it is started first."""
            values = training.describe(config.model, metrics)
            logged = step % config.log_every == 0 or step == config.steps or values["skipped"]
            progress.update(step, values if logged else None)
            if logged:
                record = {"step": step, "split": "train", **values}
                log.write(record)
                board.write(record)
                if progress.tokens_per_second:
                    speeds.append(progress.tokens_per_second)
                    seconds = time.perf_counter() - began
                    timing.write({"step": step, "seconds": seconds, "tokens_per_second": progress.tokens_per_second})
            if values["skipped_in_a_row"] >= config.max_skipped:
                checkpoints.wait()
                good = checkpoints.steps()
                raise TrainingError(
                    f"step {step}: the gradients of {values['skipped_in_a_row']} steps in a row were not finite "
                    f"(max_skipped = {config.max_skipped}); the last good checkpoint is "
                    + (f"that of step {good[-1]} in {run.checkpoints}" if good else "none: no step was saved yet")
                )

        def validate(step):
            limit = config.evaluation.final_batches if step == config.steps else config.evaluation.batches
            held_out = validation_batches(
                validation_data, batch_size=config.batch_size, seq_len=config.data.seq_len, limit=limit
            )
            values = evaluate(eval_step, state.params, held_out, validation_data, config.model, mesh)
            record = {"step": step, "split": "validation", **values}
            log.write(record)
            board.write(record)
            progress.write(
                f"step {step}  validation {values['loss']:.4f} nats/token, {values['bits_per_byte']:.4f} bits/byte"
            )
            plot_routing(run.metrics, run.routing)

        unreported = None
        for step in range(first + 1, config.steps + 1):
            state, metrics = train_step(state, training.put_batch(next(batches), mesh))
            if unreported:
                report(*unreported)
            unreported = (step, metrics)
            stopping = stop_requested.is_set()
            validating = step % config.evaluation.every == 0 or step == config.steps
            saving = step % config.checkpoint.every == 0 or step == config.steps or stopping
            if validating or saving:  # the lines of a step are written before it is saved
                report(*unreported)
                unreported = None
            if validating:
                validate(step)
            if saving:
                items = training.checkpoint_items(state, fingerprints)
                checkpoints.save(step, items, metadata=recipe.to_dict(config))
            if stopping and step < config.steps:
                checkpoints.wait()
                progress.close()
                print(f"stopped by a signal; step {step} is saved, the same command goes on")
                return STOPPED
        checkpoints.wait()
        progress.close()

        # 4. Report.
        *_, last = (json.loads(line) for line in run.metrics.open() if '"validation"' in line)
        print(f"\nrun directory     {run.path}")
        print(f"validation loss   {last['loss']:.4f} nats/token (unigram entropy {last['unigram_entropy']:.4f})")
        print(f"                  {last['bits_per_byte']:.4f} bits/byte over {last['tokens']:,} tokens")
        if speeds:
            print(f"speed             {statistics.median(speeds):,.0f} tokens/s")
        if "load_by_layer" in last:
            print(routing_table(last))
        print("\na sample:\n")
        print(LanguageModel(config, state.params, text, config.steps).generate("", max_new_tokens=200))
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
    logging.getLogger("jmoe").setLevel(logging.INFO)
    with recipe.exit_on_input_error():
        try:
            code = main(sys.argv[1:])
        except (CheckpointError, TrainingError) as error:
            sys.exit(f"error: {error}")
    sys.exit(code)
