"""QK-Clip (Kimi K2, arXiv 2507.20534, §2.1.2): a bound on attention logits, whatever the optimiser does."""

import jax
import jax.numpy as jnp

from jmoe.model.transformer import MaxLogits, Transformer


def qk_clip(params: Transformer, max_logits: MaxLogits, threshold: float) -> Transformer:
    """The model whose heads that had a logit above the threshold are scaled down, so that it would have been that.

    The factor min(1, threshold / highest logit) of a head is shared by its queries' and its keys' projection, the root
    of it each; where heads have their keys in common it goes to the queries' alone, as it would change the other heads.
    Rotary positions turn each head by itself, and so are not in the way.

    Args:
      params: the model, which is left as it is.
      max_logits: of each head, float32 [repeats, N] for each layer of each group, over the whole global batch.
      threshold: of logits as the softmax sees them, 1/√H included.
    """
    params = jax.tree.map(lambda x: x, params)
    for layers, of_group in zip(params.layers, max_logits, strict=True):
        for layer, highest in zip(layers, of_group, strict=True):
            query, key = layer.attention.query, layer.attention.key
            factor = jnp.where(highest > threshold, threshold / jnp.maximum(highest, threshold), 1.0)[:, None, :, None]
            if query.shape == key.shape:
                factor = jnp.sqrt(factor)
                layer.attention.key = key.replace(key[...] * factor)
            layer.attention.query = query.replace(query[...] * factor)
    return params
