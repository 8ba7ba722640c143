"""The layers of a model one by one, and back into groups: parameters are stored stacked over a group's repeats."""

from collections.abc import Callable, Sequence

import numpy as np

from jmoe import config
from jmoe.convert.mapping import parameter_shapes, stacks
from jmoe.flops import places

# A parameter, or a part of it, as `jmoe.convert.runs.Run.read` gives it; a layer's own by its index and local name.
Read = Callable[[str, tuple[int, ...]], np.ndarray]
ReadLayer = Callable[[int, str], np.ndarray]
Write = Callable[[str, tuple[int, ...], np.ndarray], None]


def group_layers(layers: Sequence[config.FeedForward]) -> tuple[config.LayerGroup, ...]:
    """The feed-forwards of all layers, in order, as repeated patterns: those with the fewest layers to unroll in all,
    which is what a step takes to compile."""
    count = len(layers)
    best: list[tuple[int, int, tuple[config.LayerGroup, ...]]] = [(0, 0, ())] * (count + 1)
    for start in reversed(range(count)):
        found = []
        for length in range(1, count - start + 1):
            pattern, end = tuple(layers[start : start + length]), start + length
            while True:
                unrolled, groups, rest = best[end]
                group = config.LayerGroup(pattern, (end - start) // length)
                found.append((unrolled + length, groups + 1, (group, *rest)))
                if tuple(layers[end : end + length]) != pattern:
                    break
                end += length
        best[start] = min(found, key=lambda way: way[:2])
    return best[0][2]


def by_layer(model: config.Model, read: Read) -> ReadLayer:
    """Reads (layer, name) such as (3, "attention/query") from parameters that are stacked."""
    where = places(model)

    def of_layer(layer: int, name: str) -> np.ndarray:
        g, i, repeat = where[layer]
        return np.asarray(read(f"layers/{g}/{i}/{name}", (repeat,)))

    return of_layer


def write_layers(model: config.Model, read: Read, of_layer: ReadLayer, write: Write) -> None:
    """Writes all parameters of `model`: those of layers are what `of_layer` gives, the others are `read`."""
    layers = stacks(model)
    for name in parameter_shapes(model):
        if not name.startswith("layers/"):
            write(name, (), read(name, ()))
            continue
        _, g, i, local = name.split("/", 3)
        for repeat, layer in enumerate(layers[int(g), int(i)]):
            write(name, (repeat,), of_layer(layer, local))
