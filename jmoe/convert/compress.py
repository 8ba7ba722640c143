"""What prune and merge share: which experts to keep, and the run with fewer of them."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jmoe import config
from jmoe.config import InputError, require
from jmoe.convert.calibration import Calibrated, Observed
from jmoe.convert.held_out import mean_loss
from jmoe.convert.layers import Read, by_layer, group_layers, write_layers
from jmoe.convert.runs import write_run
from jmoe.flops import feed_forwards
from jmoe.language_model import LanguageModel
from jmoe.run_directory import write_json
from jmoe.telemetry import describe_model

PLACES = {"RUN": "a run with experts", "OUT": "the run directory to make"}


@dataclass(frozen=True)
class Options:
    """Flags of `prune` and of `merge`."""

    keep: float = 0.5
    """experts left of a layer, or a fraction below 1 of them [count or fraction]"""
    by: Literal["layer", "global"] = "layer"
    """as many in each layer, or as many in all by one threshold on the score over its layer's mean [name]"""
    layers: str = ""
    """other numbers for single layers, such as 0=0,2-5=8; a layer of 0 becomes dense [list]"""
    calibrate: str | None = None
    """text to calibrate and measure on, a pattern of files as eval.py has it; the run's own held-out text if None
    [path]"""
    tokens: int = 32768
    """about so many to calibrate on, and as many to measure on [tokens]"""
    step: int | None = None
    """the checkpoint; the newest good one if None [steps]"""

    def __post_init__(self):
        require(
            0 < self.keep < 1 or self.keep == int(self.keep) >= 1,
            f"keep is {self.keep}; it must be a number of experts, or a fraction between 0 and 1",
        )
        require(self.tokens >= 1, f"tokens is {self.tokens}; it must be at least 1")


# -------------------------------------------------------------------------------------------------------------- choice


def parse_counts(text: str, layers: Sequence[int]) -> dict[int, int]:
    """Experts by layer from a list such as 0=0,2-5=8. Raises InputError."""
    found = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?=(\d+)\s*", part)
        if not match:
            raise InputError(f"layers is {text!r}; it must be a list such as 0=0,2-5=8: LAYER=EXPERTS, 0 for dense")
        for layer in range(int(match[1]), int(match[2] or match[1]) + 1):
            require(layer in layers, f"layers: layer {layer} has no experts; those that have are {list(layers)}")
            found[layer] = int(match[3])
    return found


def choose(
    moes: Mapping[int, config.MoE],
    scores: Mapping[int, np.ndarray],
    keep: float,
    by: str,
    counts: Mapping[int, int],
) -> dict[int, list[int]]:
    """The experts to keep, ascending, by layer; none where the layer becomes dense.

    Args:
      moes: settings of the MoE layers.
      scores: [E] of each layer, what is higher stays.
      keep: experts per layer, or a fraction below 1 of them.
      by: "layer" for as many in each; "global" for as many in all: those whose score over the mean of their layer is
        highest, no fewer than a token goes to.
      counts: experts of single layers, instead.

    Raises InputError where there are not as many.
    """
    for layer, moe in moes.items():
        count = counts.get(layer, keep)
        require(count <= moe.num_experts, f"layer {layer} has {moe.num_experts} experts; it cannot keep {count:g}")
        require(
            _groups(moe) == 1 or not moe.identity_experts,
            f"layer {layer} has identity experts among its {_groups(moe)} groups, which cannot be cut",
        )
    free = [layer for layer in moes if layer not in counts]
    wanted = {layer: _count(keep, moes[layer].num_experts) for layer in free}
    if by == "global" and free:
        for layer in free:
            require(_groups(moes[layer]) == 1, f"layer {layer} chooses among groups of experts; keep as many by layer")
        least = {layer: min(moes[layer].num_experts, _least(moes[layer])) for layer in free}
        relative = {layer: scores[layer] / max(scores[layer].mean(), 1e-20) for layer in free}
        ranked = {layer: np.sort(relative[layer])[::-1] for layer in free}
        rest = sorted(((x, layer) for layer in free for x in ranked[layer][least[layer] :]), reverse=True)
        total = round(keep * sum(map(len, ranked.values()))) if keep < 1 else sum(wanted.values())
        more = max(0, total - sum(least.values()))
        wanted = {layer: least[layer] + sum(of == layer for _, of in rest[:more]) for layer in free}
    return {layer: best(scores[layer], {**counts, **wanted}[layer], _groups(moes[layer]), layer) for layer in moes}


def best(scores: Float[np.ndarray, " E"], count: int, groups: int = 1, layer: int = 0) -> list[int]:
    """The `count` experts of the highest scores, ascending; as many in each of the router's groups."""
    require(
        count % groups == 0, f"layer {layer} chooses among {groups} groups of experts; {count} cannot be shared out"
    )
    by_group = scores.reshape(groups, -1)
    top = np.argsort(-by_group, axis=1, kind="stable")[:, : count // groups]
    return sorted((top + np.arange(groups)[:, None] * by_group.shape[1]).ravel().tolist())


def _count(keep: float, experts: int) -> int:
    return int(keep) if keep >= 1 else max(1, round(keep * experts))


def _groups(moe: config.MoE) -> int:
    return moe.router.groups if isinstance(moe.router, config.TopK) else 1


def _least(moe: config.MoE) -> int:
    return moe.router.k if isinstance(moe.router, config.TopK) else math.ceil(moe.router.experts_per_token or 1)


# ------------------------------------------------------------------------------------------------------- the new layers


class Group(NamedTuple):
    """An expert of the new model: a weighted mean of old ones."""

    members: tuple[int, ...]
    """old experts of one width; the router's other columns are those of none"""
    shares: tuple[float, ...]
    """of each in the mean; they sum to 1"""
    orders: tuple[np.ndarray | None, ...]
    """in which the hidden units of each are taken, int [F]; None as they are"""


def alone(expert: int) -> Group:
    """An expert that stays as it is."""
    return Group((expert,), (1.0,), (None,))


class Fewer:
    """A model with fewer experts: its architecture, and each parameter of its layers from those of the old model."""

    def __init__(
        self,
        model: config.Model,
        read: Read,
        groups: Mapping[int, Sequence[Group]],
        observed: Mapping[int, Observed],
    ):
        """`groups` are the experts of each MoE layer from narrow to wide; none for a layer that becomes dense."""
        self.old, self.groups, self.settings = by_layer(model, read), groups, feed_forwards(model)
        self.into_dense: dict[int, tuple[list[int], float]] = {}
        settings = list(self.settings)
        for layer, experts in groups.items():
            moe = settings[layer]
            assert isinstance(moe, config.MoE)
            if experts:
                settings[layer] = smaller(moe, [group.members[0] for group in experts])
            else:
                self.into_dense[layer] = stand_in(moe, observed[layer])
                require(
                    not moe.shared_gate, f"layer {layer} has a gated shared expert, which a dense layer cannot hold"
                )
                require(
                    not moe.identity_experts, f"layer {layer} has identity experts, which a dense layer cannot hold"
                )
                widths = (moe.expert_widths[e] for e in self.into_dense[layer][0])
                settings[layer] = config.Dense(sum(widths) + moe.shared_d_ff)
        self.model = dataclasses.replace(model, layers=group_layers(settings))

    def of_layer(self, layer: int, name: str) -> np.ndarray:
        """A parameter of a layer of the new model, float32."""
        local, moe = name.removeprefix("feed_forward/"), self.settings[layer]
        if local == name or layer not in self.groups or local.startswith("shared/") or local == "router/p":
            return self.old(layer, name)
        assert isinstance(moe, config.MoE)
        if layer in self.into_dense:
            return self._dense(layer, moe, local)
        groups = self.groups[layer]
        if local.startswith("router/"):
            old, E = self.old(layer, name), moe.num_experts
            columns = [
                sum(share * old[..., e] for e, share in zip(group.members, group.shares, strict=True))
                for group in groups
            ]
            return np.concatenate([np.stack(columns, -1), old[..., E:]], -1).astype(np.float32)
        _, _, bucket, matrix = local.split("/")
        width = sorted({moe.expert_widths[group.members[0]] for group in groups})[int(bucket)]
        inside = [group for group in groups if moe.expert_widths[group.members[0]] == width]
        return np.stack([self._mean(layer, moe, group, matrix) for group in inside])

    def _mean(self, layer: int, moe: config.MoE, group: Group, matrix: str) -> np.ndarray:
        total: Any = 0.0
        for e, share, order in zip(*group, strict=True):
            found = expert(self.old, layer, moe, e, matrix)
            if order is not None:
                found = found[order] if matrix == "down" else found[:, order]
            total = total + np.float32(share) * found
        return total

    def _dense(self, layer: int, moe: config.MoE, matrix: str) -> np.ndarray:
        experts, share = self.into_dense[layer]
        parts = [expert(self.old, layer, moe, e, matrix) for e in experts]
        if matrix == "down":
            parts = [np.float32(share) * part for part in parts]
        if moe.shared_d_ff:
            parts.append(self.old(layer, f"feed_forward/shared/swiglu/{matrix}"))
        return np.concatenate(parts, axis=0 if matrix == "down" else 1)


def expert(old: Any, layer: int, moe: config.MoE, e: int, matrix: str) -> np.ndarray:
    """A matrix of one expert, [D, F] or [F, D], float32; `old` reads a layer's parameters."""
    width = moe.expert_widths[e]
    bucket, first = sorted(set(moe.expert_widths)).index(width), moe.expert_widths.index(width)
    return old(layer, f"feed_forward/experts/buckets/{bucket}/{matrix}")[e - first]


def smaller(moe: config.MoE, kept: Sequence[int]) -> config.MoE:
    """The layer's settings with the experts `kept`, ascending; a token goes to no more than there are."""
    widths = tuple(moe.expert_widths[e] for e in kept)
    rule, choices = moe.router, len(kept) + moe.identity_experts
    match rule:
        case config.TopK(k=k):
            reachable = choices // rule.groups * rule.groups_per_token
            rule = dataclasses.replace(rule, k=min(k, reachable))
        case config.Nucleus(experts_per_token=float(budget)):
            most = float(min(choices, rule.max_slots or choices))
            rule = dataclasses.replace(rule, experts_per_token=min(budget, most))
    d_ff = widths[0] if len(set(widths)) == 1 else widths
    return dataclasses.replace(moe, num_experts=len(kept), d_ff=d_ff, widths="equal", router=rule)


def stand_in(moe: config.MoE, observed: Observed) -> tuple[list[int], float]:
    """The experts a dense layer is made of, as many as a token goes to and those that contribute most, and the weight
    of each: together they weigh what a token's experts do."""
    count = max(1, round(float(observed.assignments.sum() / observed.tokens)))
    return best(np.asarray(observed.saliency), count), float(observed.weight.sum() / observed.tokens) / count


# ------------------------------------------------------------------------------------------------------- the new run


def write(out: str, told: dict[str, Any], calibrated: Calibrated, groups: Mapping[int, Sequence[Group]]) -> None:
    """Makes the run directory `out`, prints what it lost, and notes it there beside `told`."""
    run, was = calibrated.run, calibrated.run.settings.model
    fewer = Fewer(was, run.read, groups, calibrated.observed)
    settings = dataclasses.replace(run.settings, model=fewer.model, run_dir=out)
    write_run(
        Path(out),
        settings,
        run.tokenizer,
        lambda writer: write_layers(fewer.model, run.read, fewer.of_layer, writer.write),
    )
    before = mean_loss(calibrated.params, was, calibrated.held_out)
    after = mean_loss(LanguageModel.load(out).params, fewer.model, calibrated.held_out)
    experts = {
        layer: [len(groups[layer]), moe.num_experts, [list(group.members) for group in groups[layer]]]
        for layer, moe in calibrated.moes.items()
    }
    lines = {"step": run.step, "loss_before": before, "loss_after": after, "text": calibrated.text}
    write_json(Path(out) / "compress.json", {**told, **lines, "experts": experts})
    print(f"{out}: {describe_model(fewer.model)}")
    print(f"before: {describe_model(was)}")
    for layer, (kept, of, members) in experts.items():
        merged = [group for group in members if len(group) > 1]
        into = f"; merged {merged}" if merged else ""
        dense = f"; dense, made of experts {fewer.into_dense[layer][0]}" if not kept else ""
        print(f"layer {layer}: {kept} of {of} experts{into}{dense}")
    print(f"held-out loss {before:.4f} before, {after:.4f} after ({after - before:+.4f} nats/token)")
    print(calibrated.text)
