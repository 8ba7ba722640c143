"""A dense feed-forward as a mixture of experts: its settings, and its matrices from the dense ones.

The hidden units of the SwiGLU are cut into G equal shares (granularity), of which the first N may become the shared
expert. The others become experts:

    copy   every expert is all of them (sparse upcycling, arXiv 2212.05055)
    drop   the same, with a share of each expert's units drawn anew (Drop-Upcycling, arXiv 2502.19261)
    split  every expert is one share; there are E of each, in E virtual groups (arXiv 2410.07524)

An expert's output is weighed by the router, so up and down are multiplied by the root of what makes up for that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from jmoe import config
from jmoe.config import require


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
        return config.TopK(default if self.top_k is None else self.top_k, renormalise=self.renormalise)


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
