"""Tokens, FLOPs and seconds that one optimiser needs to reach the loss of another, on the embedded corpus.

    python -m benchmarks.sample_efficiency [--of Muon] [--against AdamW] [--seeds 3] [--sizes small medium large]

Three sizes of a small MoE. A run keeps its learning rate after the warm-up and branches three decays from it, as
`train.py --decay-from` does, so that it ends in three fully decayed models, of 30, 55 and 100 % of the tokens. For each
size and optimiser: runs of seed 0 at learning rates a factor of two apart, until the lowest loss has neighbours on both
sides; then runs of the other seeds at that rate. Of a seed, initial weights and order of the data are the same for all.

The losses of a run by the logarithm of its tokens, piecewise linear, tell the tokens to a given loss; that of the
optimiser which ends higher is taken, so that nothing is extrapolated. Each seed gives a ratio of tokens. Means are of
their logarithms, and intervals Student's t of 95 %: of a size over its seeds, of all sizes with the spread within the
sizes pooled. FLOPs are those of the model's matrix products and of Muon's iteration; the ratio of tokens is that of the
model's alone. Seconds are those of the two optimisers' training steps, which take turns once all runs are there.

Every finished run is a line of `runs.jsonl` in the folder of results, and is not run again, so that the command goes
on where it was stopped; about two hours on two cores in all. Two commands of different `--sizes` may run side by side.
The summary and the picture are drawn from that file.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import t as student

from benchmarks.timing import Figure, measure, ratio, report
from jmoe import config, optim, recipe, training
from jmoe.allocator import keep_freed_memory
from jmoe.data import tokenizer
from jmoe.data.pipeline import train_batches, validation_batches
from jmoe.data.prepare import prepare
from jmoe.evaluation.perplexity import evaluate
from jmoe.flops import training_flops
from jmoe.optim.roles import is_matrix, sides
from jmoe.sharding import is_variable, logical_axes, make_mesh

RESULTS = Path(__file__).parent / "results" / "sample_efficiency"
BUDGETS, DECAY, WARMUP = (0.3, 0.55, 1.0), 0.2, 0.05
"""of the steps of a size; of a budget, and of a size: where decays end, how long they and the warm-up are"""
FIRST_RATES = (4e-3, 8e-3, 16e-3)
GOAL = 0.75
TEXT = config.BPE(2048)


@dataclass(frozen=True)
class Size:
    """A model and how long it is trained."""

    d_model: int
    layers: int
    steps: int
    text: config.Tokenizer = TEXT
    validation: int = 10
    """batches"""

    def settings(self, kind: str, seed: int) -> config.Config:
        """Of a run but for its learning rate. Layers stand in the pattern, which is unrolled: faster on CPU."""
        vocab = self.text.vocab_size if isinstance(self.text, config.BPE) else 257
        moe = config.MoE(8, self.d_model, config.TopK(2))
        heads = self.d_model // 32
        layers = (config.LayerGroup((moe,) * self.layers),)
        return config.Config(
            model=config.Model(vocab, self.d_model, heads, heads, 32, tie_embeddings=False, layers=layers),
            data=config.Data(tokenizer=self.text, seq_len=256),
            optim=getattr(config, kind)(schedule=config.Constant(round(WARMUP * self.steps))),
            steps=self.steps,
            batch_size=32,
            seed=seed,
        )


SIZES = {"small": Size(64, 2, 600), "medium": Size(96, 3, 500), "large": Size(128, 4, 400)}
SMOKE = {"smoke": Size(32, 1, 12, config.Bytes(), 1)}


@dataclass(frozen=True)
class Run:
    """What a finished run leaves, and what tells it from others."""

    size: str
    optimiser: str
    learning_rate: float
    seed: int
    settings: config.Config
    plan: tuple[float, ...]
    """`BUDGETS`, `DECAY` and the batches of held-out text"""
    tokens: tuple[int, ...] = ()
    """to the end of each decay, those of the decay included"""
    losses: tuple[float, ...] = ()
    """then, on held-out text [nats/token]; infinite where training diverged"""
    train: tuple[tuple[int, float], ...] = ()
    """of some steps of the constant rate: step and training loss"""
    flops_per_token: float = 0.0
    """of a training step, the optimiser's iteration included"""
    device: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return self.size, self.optimiser, self.learning_rate, self.seed, self.settings, self.plan

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"settings": recipe.to_dict(self.settings)})

    @classmethod
    def from_json(cls, line: str) -> "Run":
        fields: dict[str, Any] = json.loads(line)
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        fields["settings"] = recipe.from_dict(fields["settings"])
        return cls(**fields)


def iteration_flops(rule: Any, params: Any) -> float:
    """FLOPs of the matrix products in a step of Muon's iteration: with XXᵀ of the smaller side m of an m x n matrix,
    2m²n + 2m³ + 2m²n each time; 0 for an optimiser without one."""
    if not hasattr(rule, "iterations"):
        return 0.0
    total = 0.0
    for variable in jax.tree.leaves(params, is_leaf=is_variable):
        axes, shape = logical_axes(variable), variable.shape
        if is_matrix(rule, axes):
            m, n = sorted(sides(axes, rule.heads).sizes(shape))
            total += math.prod(shape) / (m * n) * rule.iterations * (4 * m * m * n + 2 * m**3)
    return total


class Trainer:
    """The runs of one optimiser at one size: one program serves every learning rate and seed."""

    def __init__(self, name: str, size: Size, kind: str):
        self.name, self.size, self.kind = name, size, kind
        self.settings = settings = size.settings(kind, 0)
        self.mesh = make_mesh(config.Mesh(), jax.devices()[:1])
        text = tokenizer.load(settings.data)
        self.train_data, self.held_out = (prepare(settings.data, text, split) for split in ("train", "validation"))
        step = partial(training.take_step, settings=settings)
        self.step = training.OnMesh(jax.jit(step, donate_argnums=0), self.mesh)
        self.evaluate = training.make_eval_step(settings, self.mesh)
        self.tokens_per_step = settings.batch_size * settings.data.seq_len
        params = training.abstract_state(settings, self.mesh).params
        width = 2 * size.d_model
        own = training_flops(settings.model, settings.data.seq_len, [width] * size.layers)
        self.flops_per_token = own + iteration_flops(settings.optim, params) / self.tokens_per_step

    def blank(self, rate: float, seed: int) -> Run:
        """The run before it is run."""
        settings, plan = self.size.settings(self.kind, seed), (*BUDGETS, DECAY, self.size.validation)
        return Run(self.name, self.kind, rate, seed, settings, plan)

    def run(self, rate: float, seed: int) -> Run:
        """Trains at a constant rate, and from its branches through their decays."""
        state = training.create_state(dataclasses.replace(self.settings, seed=seed), self.mesh)
        at, train, ends, losses = 0, [], [], []
        for budget in BUDGETS:
            end = round(budget * self.size.steps)
            branch = end - round(DECAY * end)
            schedule = config.WSD(self.settings.optim.schedule.warmup_steps, decay_start=branch)
            rule = dataclasses.replace(self.settings.optim, learning_rate=rate, schedule=schedule)
            rates = np.asarray(jax.vmap(optim.schedule(rule, end))(jnp.arange(end)), np.float32)
            state, told = self.advance(state, at, rates[:branch], seed)
            train += told
            decayed, _ = self.advance(jax.tree.map(jnp.copy, state), branch, rates, seed)
            ends.append(end * self.tokens_per_step)
            losses.append(self.loss(decayed.params))
            at = branch
        return dataclasses.replace(
            self.blank(rate, seed),
            tokens=tuple(ends),
            losses=tuple(losses),
            train=tuple(train),
            flops_per_token=self.flops_per_token,
            device=jax.devices()[0].device_kind,
        )

    def batches(self, seed: int, start: int):
        """Of training, from a step on."""
        settings = self.settings
        return train_batches(
            self.train_data,
            batch_size=settings.batch_size,
            seq_len=settings.data.seq_len,
            seed=seed,
            start_step=start,
        )

    def advance(self, state, start: int, rates: np.ndarray, seed: int):
        """Takes the steps from `start` to the last of `rates`; beside the state, some steps and their losses."""
        told = []
        batches = self.batches(seed, start)
        for step in range(start, len(rates)):
            batch = training.put_batch(next(batches), self.mesh)
            state, metrics = self.step(state, batch, jnp.asarray(rates[step]))
            if step % max(1, self.size.steps // 50) == 0:
                told.append((step + 1, round(float(metrics.scalars["cross_entropy"]), 4)))
        batches.close()
        return state, told

    def one_step(self) -> Callable[[], Any]:
        """A step on one batch, again and again, to be timed."""
        batches = self.batches(0, 0)
        batch, rate = training.put_batch(next(batches), self.mesh), jnp.asarray(1e-3)
        batches.close()
        state = training.create_state(self.settings, self.mesh)

        def step():
            nonlocal state
            state, metrics = self.step(state, batch, rate)
            return metrics.scalars["cross_entropy"]

        return step

    def loss(self, params) -> float:
        """On held-out text."""
        batches = validation_batches(
            self.held_out,
            batch_size=self.settings.batch_size,
            seq_len=self.settings.data.seq_len,
            limit=self.size.validation,
        )
        values = evaluate(self.evaluate, params, batches, self.held_out, self.settings, self.mesh)
        return values["loss"] if math.isfinite(values["loss"]) else math.inf


class Store:
    """The finished runs, in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):  # torn by a kill
            path.write_text("".join(whole))
        self.runs = {run.key: run for run in map(Run.from_json, whole)}

    def get(self, trainer: Trainer, rate: float, seed: int) -> Run:
        """The run, from the file if it is there."""
        key = trainer.blank(rate, seed).key
        if key not in self.runs:
            run = trainer.run(rate, seed)
            with self.path.open("a") as stream:
                stream.write(run.to_json() + "\n")
            self.runs[key] = run
        run = self.runs[key]
        print(f"{run.size:<8}{run.optimiser:<10}{rate:<10.3g}seed {seed}  " + "  ".join(f"{x:.4f}" for x in run.losses))
        return run


def bracket(loss_at: Callable[[float], float], first: Sequence[float], factor: float = 2.0) -> float:
    """The learning rate of the lowest loss, of those in `first` and further ones below or above, `factor` apart, until
    the lowest has a neighbour on either side."""
    losses = {rate: loss_at(rate) for rate in first}
    for _ in range(12):
        rates = sorted(losses)
        best = min(rates, key=losses.__getitem__)
        if best not in (rates[0], rates[-1]):
            return best
        rate = best / factor if best == rates[0] else best * factor
        losses[rate] = loss_at(rate)
    raise RuntimeError(f"the loss falls on and on with the learning rate: {losses}")


def tokens_to(loss: float, run: Run) -> float:
    """The tokens at which the decayed models of a run have this loss; where even the first is lower, those of it."""
    return float(np.exp(np.interp(-loss, -np.array(run.losses), np.log(run.tokens))))


def log_ratio(of: Run, against: Run) -> float:
    """log of the tokens to equal loss: of the one over those of the other."""
    loss = max(of.losses[-1], against.losses[-1])
    return math.log(tokens_to(loss, of) / tokens_to(loss, against))


def is_bound(of: Run, against: Run) -> bool:
    """Whether the better of the two reaches the loss of the other before its first decay ends: their ratio is further
    from 1 than `log_ratio` says, and its spread is not known."""
    return max(of.losses[-1], against.losses[-1]) > min(of.losses[0], against.losses[0])


def interval(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """exp of the mean of the groups' means, and of the bounds of its 95 % interval, by the pooled spread within the
    groups and Student's t."""
    arrays = [np.asarray(group, float) for group in groups]
    mean = float(np.mean([group.mean() for group in arrays]))
    freedom = sum(len(group) - 1 for group in arrays)
    variance = sum(((group - group.mean()) ** 2).sum() for group in arrays) / freedom
    error = math.sqrt(variance * sum(1 / len(group) for group in arrays)) / len(arrays)
    margin = float(student.ppf(0.975, freedom)) * error
    return math.exp(mean), math.exp(mean - margin), math.exp(mean + margin)


Pairs = Mapping[str, Sequence[tuple[Run, Run]]]
"""By size, of each seed the runs of the one and of the other optimiser."""


def summary(pairs: Pairs, step_times: Mapping[str, float]) -> list[Figure]:
    """Ratios to equal loss, of each size and of all; `step_times` are those of a step's time, by size."""
    figures = []

    def per_token(what: str, pair: tuple[Run, Run]) -> float:
        of, against = pair
        flops = of.flops_per_token / against.flops_per_token
        return {"tokens": 1.0, "flops": flops, "seconds": step_times[of.size]}[what]

    for name in (*pairs, *(["all sizes"] if len(pairs) > 1 else [])):
        chosen = [pairs[name]] if name in pairs else list(pairs.values())
        for what in ("tokens", "flops", "seconds"):
            groups = [[log_ratio(*pair) + math.log(per_token(what, pair)) for pair in size] for size in chosen]
            mean, low, high = interval(groups)
            bound = ", at most" if any(is_bound(*pair) for size in chosen for pair in size) else ""
            figures.append(Figure(f"{name}: {what} to equal loss{bound} [{low:.3f}, {high:.3f}]", mean))
            if name == "all sizes" and what == "flops":
                figures.append(Figure("all sizes: upper bound of the FLOP ratio", high, "x", "at most", GOAL))
    return figures


def draw(pairs: Pairs, path: Path) -> None:
    """Held-out loss over tokens, a panel for each size: of each optimiser the runs at its best learning rate."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(4 * len(pairs), 3.2), layout="constrained")
    for axes, (name, runs) in zip(np.ravel(picture.subplots(1, len(pairs), squeeze=False)), pairs.items(), strict=True):
        for column, color in enumerate(("#c44e52", "#4c72b0")):
            for seed, run in enumerate(pair[column] for pair in runs):
                label = f"{run.optimiser}, {run.learning_rate:.2g}" if seed == 0 else None
                axes.plot(run.tokens, run.losses, marker="o", markersize=3, linewidth=0.8, color=color, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("training tokens")
        axes.set_title(f"{name}: {interval([[log_ratio(*pair) for pair in runs]])[0]:.2f} x the tokens", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
        axes.grid(alpha=0.3)
    picture.axes[0].set_ylabel("held-out loss [nats/token]")
    picture.savefig(path, dpi=150)


def main() -> None:
    """Runs what is not yet there, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default="Muon", help="the optimiser: a kind of config.optim")
    parser.add_argument("--against", default="AdamW", help="the one whose loss is to be reached")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="one tiny size of a few steps: whether it runs")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("an interval takes two seeds or more")
    keep_freed_memory()
    store = Store(args.results / "runs.jsonl")
    pairs, step_times = {}, {}
    for name, size in (SMOKE if args.smoke else {name: SIZES[name] for name in args.sizes}).items():
        columns, trainers = [], {}
        for kind in (args.of, args.against):
            trainers[kind] = trainer = Trainer(name, size, kind)
            best = bracket(lambda rate, trainer=trainer: store.get(trainer, rate, 0).losses[-1], FIRST_RATES)
            columns.append([store.get(trainer, best, seed) for seed in range(args.seeds)])
        pairs[name] = list(zip(*columns, strict=True))
        times = measure({kind: trainer.one_step() for kind, trainer in trainers.items()}, rounds=9)
        step_times[name] = ratio(times, args.of, args.against)
    report(f"{args.of} over {args.against}", summary(pairs, step_times), args.results / "summary.json")
    draw(pairs, args.results / "loss.png")


if __name__ == "__main__":
    main()
