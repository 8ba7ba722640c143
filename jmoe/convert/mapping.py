"""jmoe's parameters as single tensors under other names.

jmoe stores matrices as [inputs, outputs], with heads apart, stacked over the repeats of a layer group, and experts
stacked in buckets; elsewhere each matrix of each layer and expert is a tensor [outputs, inputs] of its own. A `Table`
says how a family names them, and `pieces` which part of which parameter each tensor is.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import numpy as np

from jmoe import config
from jmoe.checkpoint import flatten
from jmoe.config import InputError
from jmoe.convert.shards import contiguous
from jmoe.flops import places
from jmoe.model.transformer import Transformer

# Name of a parameter in its layer (or in the model) → name of the tensor, in which {layer} and {expert} stand for
# their numbers. Parameters that the model at hand lacks may be listed all the same.
Table = Mapping[str, str]

# Leading dimensions that a matrix maps from, by the name of the parameter; the others are vectors and tables, which are
# the same everywhere.
INPUTS = {
    "head": 1,
    "attention/query": 1,
    "attention/key": 1,
    "attention/value": 1,
    "attention/out": 2,
    "feed_forward/gate": 1,
    "feed_forward/up": 1,
    "feed_forward/down": 1,
    "feed_forward/router/weight": 1,
    "feed_forward/experts/gate": 1,
    "feed_forward/experts/up": 1,
    "feed_forward/experts/down": 1,
    "feed_forward/shared/swiglu/gate": 1,
    "feed_forward/shared/swiglu/up": 1,
    "feed_forward/shared/swiglu/down": 1,
    "feed_forward/shared/weight": 1,
}


@dataclass(frozen=True)
class Piece:
    """A tensor and the part of a parameter that it is."""

    name: str
    """of the tensor"""
    shape: tuple[int, ...]
    """of the tensor"""
    parameter: str
    """such as layers/0/1/attention/query, as `jmoe.checkpoint.flatten` names it"""
    index: tuple[int, ...]
    """of the repeat, and of the expert in its bucket: parameter[index] is the part"""
    part: tuple[int, ...]
    """shape of the part"""
    inputs: int
    """leading dimensions of the part that a matrix maps from; 0 for what is no matrix"""

    def to_tensor(self, part: np.ndarray) -> np.ndarray:
        """The tensor, of shape `shape`, from the part of the parameter, of shape `part`; it may be a view."""
        if not self.inputs:
            return part
        return part.reshape(math.prod(self.part[: self.inputs]), -1).T

    def to_part(self, tensor: np.ndarray) -> np.ndarray:
        """The part of the parameter from the tensor, the inverse of `to_tensor`."""
        return (contiguous(tensor.T) if self.inputs else tensor).reshape(self.part)


@lru_cache(maxsize=4)  # each conversion asks several times
def parameter_shapes(model: config.Model) -> Mapping[str, tuple[int, ...]]:
    """Shape of each parameter, float32, under the names of `jmoe.checkpoint.flatten`."""
    shapes = jax.eval_shape(partial(Transformer, model), jax.random.key(0))
    return {name: leaf.shape for name, leaf in flatten(shapes).items()}


def stacks(model: config.Model) -> Mapping[tuple[int, int], list[int]]:
    """The layers whose parameters are stacked, in the order of the stack, by their group and place in its pattern."""
    found = defaultdict(list)
    for layer, (g, i, _) in enumerate(places(model)):
        found[g, i].append(layer)
    return found


def pieces(model: config.Model, table: Table) -> Iterator[Piece]:
    """Every tensor of the model, in the order of the parameters. Raises InputError for a parameter without a name."""
    layers = stacks(model)
    for parameter, shape in parameter_shapes(model).items():
        if not (found := re.fullmatch(r"layers/(\d+)/(\d+)/(.*)", parameter)):
            yield _piece(parameter, (), shape, parameter, table)
            continue
        g, i, local = int(found[1]), int(found[2]), found[3]
        if not (in_bucket := re.fullmatch(r"(feed_forward/experts/)buckets/(\d+)/(.*)", local)):
            for repeat, layer in enumerate(layers[g, i]):
                yield _piece(parameter, (repeat,), shape, local, table, layer=layer)
            continue
        moe, name = model.layers[g].pattern[i], in_bucket[1] + in_bucket[3]
        assert isinstance(moe, config.MoE)
        width = sorted(set(moe.expert_widths))[int(in_bucket[2])]
        experts = [e for e, its in enumerate(moe.expert_widths) if its == width]
        for repeat, layer in enumerate(layers[g, i]):
            for e, expert in enumerate(experts):
                yield _piece(parameter, (repeat, e), shape, name, table, layer=layer, expert=expert)


def _piece(parameter: str, index: tuple[int, ...], shape: tuple[int, ...], local: str, table: Table, **numbers: int):
    if local not in table:
        raise InputError(f"there is no name for the parameter {parameter}")
    part, inputs = shape[len(index) :], INPUTS.get(local, 0)
    tensor = (math.prod(part[inputs:]), math.prod(part[:inputs])) if inputs else part
    return Piece(table[local].format(**numbers), tensor, parameter, index, part, inputs)
