"""upcycle: a dense model to a mixture of experts, `python -m jmoe.convert upcycle DENSE OUT [--flag value ...]`.

The hidden units of a layer's SwiGLU are cut into G equal shares (granularity), of which the first N may become the
shared expert. The others become experts:

    copy   every expert is all of them (sparse upcycling, arXiv 2212.05055)
    drop   the same, with a share of each expert's units drawn anew (Drop-Upcycling, arXiv 2502.19261)
    split  every expert is one share; there are E of each, in E virtual groups (arXiv 2410.07524)

An expert's output is weighed by the router, so up and down are multiplied by the root of what makes up for that.
"""

import contextlib
import dataclasses
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from jmoe import config, recipe
from jmoe.config import InputError, require
from jmoe.convert import importing
from jmoe.convert.folder import check_new
from jmoe.convert.held_out import Difference, batches_of, difference, prepare_text, random_batch
from jmoe.convert.layers import Read, by_layer, group_layers, write_layers
from jmoe.convert.runs import Run, write_run
from jmoe.flops import feed_forwards
from jmoe.language_model import LanguageModel
from jmoe.run_directory import write_json
from jmoe.telemetry import describe_model


@dataclass(frozen=True)
class Options:
    """Flags of the command."""

    method: Literal["copy", "split", "drop"] = "copy"
    """what an expert is made of [name]"""
    experts: int = 8
    """experts of a layer; with split, experts made of each share [count]"""
    top_k: int | None = None
    """experts a token goes to; with split a multiple of the routed shares keeps the function. None for 2, or with split
    for one share of each [count]"""
    nucleus: float | None = None
    """route by nucleus with this threshold instead of top-k [probability]"""
    renormalise: bool = True
    """a token's top-k combine weights sum to 1, which keeps the function; at top-1 the router then learns from the
    balance losses alone [switch]"""
    granularity: int = 1
    """equal shares that the hidden units are cut into [count]"""
    shared: int = 0
    """of them in the shared expert, which every token passes [count]"""
    drop: float = 0.5
    """with drop, the share of an expert's hidden units that is drawn anew [fraction]"""
    router: str = "random"
    """random, or from:RUN for weights, state and rule of a trained run's routers, layer by layer; the flags above may
    give another rule [random or from:RUN]"""
    router_std: float = 0.02
    """standard deviation of random routers; MiniCPM-MoE has 0.1 [unitless]"""
    layers: str = "all"
    """which become mixtures: all dense ones, every:2 for layers 1, 3, 5 ..., or a list such as 2,4,6-11 [layers]"""
    step: int | None = None
    """the checkpoint of DENSE; the newest good one if None [steps]"""
    seed: int = 0
    """of what is drawn [unitless]"""
    data: str | None = None
    """text to report on, a pattern of files as eval.py has it; DENSE's own held-out text if None, random tokens where
    that is not there [path]"""

    def __post_init__(self):
        for name in ("experts", "granularity"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        require(
            0 <= self.shared < self.granularity,
            f"shared is {self.shared}; it must be less than granularity = {self.granularity}, the shares there are",
        )
        require(self.top_k is None or self.nucleus is None, "top_k and nucleus exclude each other: give one of the two")
        require(0.0 <= self.drop <= 1.0, f"drop is {self.drop}; it must lie in [0, 1]")
        require(self.router_std >= 0, f"router_std is {self.router_std}; it must not be negative")
        require(self.seed >= 0, f"seed is {self.seed}; it must not be negative")
        require(
            self.router == "random" or self.router.startswith("from:"),
            f"router is {self.router!r}; it must be random or from:RUN",
        )

    @property
    def routed(self) -> int:
        """Shares in a virtual group: experts that together are what the shared expert leaves of the MLP."""
        return self.granularity - self.shared if self.method == "split" else 1

    def rule(self, given: config.Router | None) -> config.Router:
        """How tokens choose: as the flags say, as the `given` router has it where they do not, or else by default."""
        if self.nucleus is not None:
            return config.Nucleus(self.nucleus)
        if self.top_k is None and given is not None:
            return given
        default = self.routed if self.method == "split" else min(2, self.experts)
        return config.TopK(self.top_k or default, renormalise=self.renormalise)


def parse_layers(text: str, count: int) -> list[int]:
    """The layers that `all`, `every:n` or a list such as 2,4,6-11 means, of `count`. Raises InputError."""
    if text == "all":
        return list(range(count))
    if every := re.fullmatch(r"every:(\d+)", text):
        require(1 <= int(every[1]) <= count, f"layers is {text}; of {count} layers that is none")
        return list(range(int(every[1]) - 1, count, int(every[1])))
    found = set()
    for part in text.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not ends:
            raise InputError(f"layers is {text!r}; it must be all, every:N, or a list such as 2,4,6-11")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        require(first <= last < count, f"layers: {part} is not among the {count} layers, 0 to {count - 1}")
        found |= set(range(first, last + 1))
    return sorted(found)


def mixture(dense: config.Dense, options: Options, given: config.Router | None = None) -> config.MoE:
    """What a dense feed-forward becomes. Raises InputError where it cannot be cut so."""
    require(
        dense.d_ff % options.granularity == 0,
        f"granularity = {options.granularity} does not divide the {dense.d_ff} hidden features of the dense layer",
    )
    share = dense.d_ff // options.granularity
    return config.MoE(
        num_experts=options.experts * options.routed,
        d_ff=share if options.method == "split" else dense.d_ff - options.shared * share,
        router=options.rule(given),
        shared_d_ff=options.shared * share,
    )


def scale(moe: config.MoE, routed: int) -> float:
    """What an expert's output is multiplied by, so that under a router without preference a token's experts give what
    the `routed` shares of a virtual group do together: the shares over the sum of a token's combine weights."""
    choices = moe.num_choices
    match moe.router:
        case config.TopK(renormalise=True, scale=times):
            mass = times
        case config.TopK(score="sigmoid", k=k, scale=times):
            mass = times * k / 2
        case config.TopK(k=k, scale=times):
            mass = times * k / choices
        case config.Nucleus() as rule:
            mass = rule.slots(choices) / choices
    return routed / mass


def deviations(moe: config.MoE, options: Options, *, virtual_groups: bool = True) -> list[str]:
    """Why such a mixture does not compute what the dense layer did; empty where it does."""
    found, rule = [], moe.router
    if options.method == "drop" and options.drop:
        found.append(f"{options.drop:.0%} of each expert's hidden units are drawn anew")
    if isinstance(rule, config.Nucleus):
        found.append("combine weights of a nucleus sum to less than 1, by what the token decides")
    elif not rule.renormalise:
        found.append("combine weights that are not renormalised sum to what the router decides")
    if options.routed > 1 and isinstance(rule, config.TopK):
        if rule.k % options.routed:
            found.append(f"top-k = {rule.k} is no multiple of the {options.routed} shares, so some are left out")
        elif rule.groups > 1 or not virtual_groups:
            found.append("shares are chosen each by itself, so some are left out")
    return found


def feed_forward(
    name: str, layer: int, dense: Callable[[str], np.ndarray], moe: config.MoE, options: Options
) -> Float[np.ndarray, "*shape"]:
    """A matrix of the mixture that the feed-forward of `layer` becomes, float32.

    Args:
      name: experts/buckets/0/M or shared/swiglu/M, where M is gate or up, [(E,) D, F], or down, [(E,) F, D].
      layer: its index; what is drawn anew depends on it and on `options.seed` alone.
      dense: gives the dense layer's matrix M, float32.
      moe: of `mixture`.
      options: of the command.
    """
    matrix = name.rsplit("/", 1)[1]
    units = dense(matrix) if matrix == "down" else dense(matrix).T  # [F, D]
    if name.startswith("shared/"):
        units = units[: moe.shared_d_ff]
        return np.ascontiguousarray(units if matrix == "down" else units.T)
    units = units[moe.shared_d_ff :].reshape(options.routed, -1, units.shape[1])
    experts = np.tile(units, (options.experts, 1, 1))  # share s of virtual group e is expert e · routed + s
    if options.method == "drop":
        for e, expert in enumerate(experts):
            # The same units in all three matrices.
            rows = np.random.default_rng([options.seed, layer, e]).permutation(len(expert))
            rows = rows[: round(options.drop * len(rows))]
            if len(rows):
                draw = np.random.default_rng([options.seed, layer, e, ("gate", "up", "down").index(matrix)])
                old = expert[rows]
                expert[rows] = draw.normal(old.mean(), old.std(), old.shape)
    if matrix != "gate":
        experts *= np.float32(math.sqrt(scale(moe, options.routed)))
    return experts if matrix == "down" else np.ascontiguousarray(experts.swapaxes(1, 2))


def router_weight(layer: int, d_model: int, options: Options) -> Float[np.ndarray, "D C"]:
    """A random router, float32: a column for each virtual group, repeated for its experts."""
    draw = np.random.default_rng([options.seed, layer])
    weight = draw.normal(0.0, options.router_std, (d_model, options.experts)).astype(np.float32)
    return np.repeat(weight, options.routed, axis=1)


class Plan:
    """The model that a dense one becomes: its architecture, and each of its parameters from those of the dense one.

    Raises InputError where a layer is no dense one, cannot be cut, or a given router does not fit.
    """

    def __init__(self, dense: config.Model, read: Read, options: Options, given: tuple[config.Model, Read] | None):
        """`read` gives the dense model's parameters; `given` are architecture and parameters of the run whose routers
        are taken."""
        settings = feed_forwards(dense)
        mixtures = [i for i, each in enumerate(settings) if isinstance(each, config.MoE)]
        chosen = parse_layers(options.layers, len(settings))
        if options.layers == "all":
            chosen = [i for i in chosen if i not in mixtures]
        require(bool(chosen), "the model has no dense layer to make a mixture of")
        for i in chosen:
            require(i not in mixtures, f"layer {i} is a mixture already; name dense ones in layers")
        self.options, self.dense, self.given_layer = options, by_layer(dense, read), None
        givens: dict[int, config.MoE] = {}
        if given is not None:
            givens, self.given_layer = check_given(given[0], dense, chosen, options), by_layer(*given)
        self.mixtures: dict[int, config.MoE] = {}
        self.virtual_groups: dict[int, bool] = {}
        for i in chosen:
            each, of_run = settings[i], givens.get(i)
            assert isinstance(each, config.Dense)
            self.mixtures[i] = settings[i] = mixture(each, options, of_run and of_run.router)
            self.virtual_groups[i] = of_run is None or of_run.num_choices == options.experts
        self.model = dataclasses.replace(dense, layers=group_layers(settings))

    def of_layer(self, layer: int, name: str) -> np.ndarray:
        """A parameter of a layer of the new model, float32."""
        local = name.removeprefix("feed_forward/")
        if local == name or layer not in self.mixtures:
            return self.dense(layer, name)
        moe = self.mixtures[layer]
        if not local.startswith("router/"):
            return feed_forward(local, layer, lambda m: self.dense(layer, f"feed_forward/{m}"), moe, self.options)
        if self.given_layer is None:
            assert local == "router/weight"
            return router_weight(layer, self.dense(layer, "feed_forward_norm/gain").shape[0], self.options)
        found = self.given_layer(layer, name)
        if found.ndim and found.shape[-1] != moe.num_choices:
            found = np.repeat(found, self.options.routed, axis=-1)
        return found


def check_given(model: config.Model, dense: config.Model, chosen: list[int], options: Options) -> dict[int, config.MoE]:
    """The mixtures of the run whose routers are taken, by layer. Raises InputError where one does not fit."""
    require(
        model.d_model == dense.d_model,
        f"{options.router} has d_model = {model.d_model}, the dense model {dense.d_model}: its routers do not fit",
    )
    settings, found = feed_forwards(model), {}
    fitting = sorted({options.experts, options.experts * options.routed})
    for i in chosen:
        moe = settings[i] if i < len(settings) else None
        require(isinstance(moe, config.MoE), f"{options.router} has no mixture as layer {i}, so no router for it")
        assert isinstance(moe, config.MoE)
        require(
            moe.num_choices in fitting and not moe.identity_experts,
            f"{options.router}: the router of layer {i} chooses from {moe.num_experts} experts and "
            f"{moe.identity_experts} identity experts; it must be {' or '.join(map(str, fitting))} experts",
        )
        found[i] = moe
    return found


def main(argv: list[str]) -> None:
    """The command. Raises InputError before anything is written."""
    places = {"DENSE": "a dense run, or a Hugging Face folder of one", "OUT": "the run directory to make"}
    (given_dir, out), options = recipe.positional_arguments(argv, Options(), places)
    check_new(Path(out))
    dense_dir = given_dir
    with contextlib.ExitStack() as stack:
        if any(Path(given_dir).glob("*.safetensors")):
            dense_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="jmoe-upcycle-"))
            importing.import_(Path(given_dir), Path(dense_dir), importing.Options())
        run, given = Run(Path(dense_dir), options.step), None
        if options.router != "random":
            routers = Run(Path(options.router.removeprefix("from:")))
            given = routers.settings.model, routers.read
        plan = Plan(run.settings.model, run.read, options, given)
        try:
            batch = batches_of(prepare_text(run.settings, run.tokenizer, options.data), 4096)[0]
            text = options.data or "the held-out text"
        except InputError as error:
            if options.data is not None:
                raise
            batch, text = random_batch(run.settings), f"random tokens ({error})"
        settings = dataclasses.replace(run.settings, model=plan.model, run_dir=out)
        write_run(
            Path(out),
            settings,
            run.tokenizer,
            lambda writer: write_layers(plan.model, run.read, plan.of_layer, writer.write),
        )
        dense, made = (LanguageModel.load(path, step=step) for path, step in ((dense_dir, run.step), (out, 0)))
        found = difference(dense.params, made.params, run.settings.model, plan.model, batch)
    told = {"from": given_dir, "step": run.step, "options": recipe.to_dict(options)}
    write_json(Path(out) / "upcycle.json", {**told, "measured_on": text, **found._asdict()})
    print(f"{out}: {describe_model(plan.model)}")
    print(report(plan, found))
    print(f"over {int((batch.segment_ids > 0).sum()):,} tokens of {text}")


def report(plan: Plan, found: Difference) -> str:
    """What the upcycling kept of the dense model's function, in lines."""
    kept = "the function is kept" if found.logits < 1e-5 else "the function is not kept"
    lines = [
        f"{kept}: logits differ by {found.logits:.1e} of the largest; "
        f"loss {found.losses[0]:.4f} dense, {found.losses[1]:.4f} as a mixture"
    ]
    by_reason: dict[tuple[str, ...], list[int]] = {}
    for layer, moe in plan.mixtures.items():
        reasons = deviations(moe, plan.options, virtual_groups=plan.virtual_groups[layer])
        by_reason.setdefault(tuple(reasons), []).append(layer)
    for reasons, layers in by_reason.items():
        most = max(found.layers[layer] for layer in layers)
        lines.append(f"layers {', '.join(map(str, layers))}: outputs differ by at most {most:.1e} of their norm")
        lines += [f"  {reason}" for reason in reasons]
    return "\n".join(lines)
