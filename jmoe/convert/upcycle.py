"""upcycle: a dense model to a mixture of experts, `python -m jmoe.convert upcycle DENSE OUT [--flag value ...]`."""

import contextlib
import dataclasses
import re
import tempfile
from pathlib import Path

import numpy as np

from jmoe import config, recipe
from jmoe.config import InputError, require
from jmoe.convert import importing
from jmoe.convert.held_out import Difference, batches_of, difference, random_batch
from jmoe.convert.layers import Read, by_layer, group_layers, write_layers
from jmoe.convert.mixture import Options, deviations, feed_forward, mixture, router_weight
from jmoe.convert.runs import Run, write_run
from jmoe.data.prepare import prepare_held_out
from jmoe.flops import feed_forwards
from jmoe.folder import check_new
from jmoe.language_model import LanguageModel
from jmoe.run_directory import write_json
from jmoe.telemetry import describe_model


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
            batch = batches_of(prepare_held_out(run.settings.data, run.tokenizer, options.data), 4096)[0]
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
