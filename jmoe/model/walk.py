"""A forward pass layer by layer, for those who look at what each feed-forward is given and does with it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jmoe import config
from jmoe.batch import Batch
from jmoe.flops import feed_forwards, places
from jmoe.model.attention import Place
from jmoe.model.moe import MoE
from jmoe.model.transformer import Layer, Transformer


class Visit(NamedTuple):
    """One layer of a forward pass."""

    number: int
    """of the layer, from 0"""
    settings: config.FeedForward
    layer: Layer
    """with parameters of its own, not stacked"""
    inputs: Array
    """[B, S, D]: what its feed-forward is given, normalised"""
    outputs: Array
    """[B, S, D]: what its feed-forward adds to the residual stream"""
    residual: Array
    """[B, S, D]: the residual stream after it"""


def layers_of(params: Transformer, model: config.Model) -> Iterator[tuple[int, config.FeedForward, Layer]]:
    """Index, settings and parameters of every layer in order, each taken out of its stack when it is its turn."""
    for index, ((g, i, repeat), settings) in enumerate(zip(places(model), feed_forwards(model), strict=True)):
        own: Any = jax.tree.map(lambda x, r=repeat: x[r], params.layers[g][i])
        yield index, settings, own


def walk(params: Transformer, model: config.Model, batch: Batch, dtype: str = "float32") -> Iterator[Visit]:
    """Every layer of a forward pass over `batch` on one device, in order. Layers alike are compiled once."""
    batch = jax.tree.map(jnp.asarray, batch)
    place = Place(batch.segment_ids, batch.positions, batch.segment_ids, batch.positions)
    x = params.embedding[...][batch.tokens].astype(dtype)
    for index, settings, layer in layers_of(params, model):
        x, inputs = _attend(layer, x, place)
        outputs = apply(layer.feed_forward, inputs, batch.segment_ids > 0)
        x = x + outputs
        yield Visit(index, settings, layer, inputs, outputs, x)


@jax.jit
def _attend(layer: Layer, x: Float[Array, "B S D"], place: Place):
    mixed, _ = layer.attention(layer.attention_norm(x), place)
    return x + mixed, layer.feed_forward_norm(x + mixed)


@jax.jit
def apply(feed_forward: Any, inputs: Float[Array, "B S D"], valid: Bool[Array, "B S"]) -> Float[Array, "B S D"]:
    """The output of a feed-forward, dense or a mixture; tokens that are not `valid` go to no expert."""
    return feed_forward(inputs, valid)[0] if isinstance(feed_forward, MoE) else feed_forward(inputs)
