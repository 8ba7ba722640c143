"""QK-Clip (Kimi K2, arXiv 2507.20534, §2.1.2): a bound on attention logits, whatever the optimiser does."""

import jax
import jax.numpy as jnp

from jmoe.model.transformer import MaxLogits, Transformer


def qk_clip(params: Transformer, max_logits: MaxLogits, threshold: float) -> Transformer:
    """The model whose heads that had a logit above the threshold are scaled down, so that it would have been that.

    The factor min(1, threshold / highest logit) of a head is shared by its queries' and its keys' projection, biases
    included, the root of it each; where heads have their keys in common it goes to the queries' alone, as it would
    change the other heads.
    Rotary positions turn each head by itself, and so are not in the way.

    Args:
      params: the model, which is left as it is.
      max_logits: of each head, float32 [repeats, N] for each layer of each group, over the whole global batch.
      threshold: of logits as the softmax sees them, 1/√H included.
    """
    params = jax.tree.map(lambda x: x, params)
    for layers, of_group in zip(params.layers, max_logits, strict=True):
        for layer, highest in zip(layers, of_group, strict=True):
            attention = layer.attention
            factor = jnp.where(highest > threshold, threshold / jnp.maximum(highest, threshold), 1.0)
            names = ["query"]
            if attention.query.shape == attention.key.shape:
                names, factor = ["query", "key"], jnp.sqrt(factor)
            for name in names:
                weight, bias = getattr(attention, name), getattr(attention, f"{name}_bias")
                setattr(attention, name, weight.replace(weight[...] * factor[:, None, :, None]))
                if bias is not None:
                    by_head = bias[...].reshape(*factor.shape, -1) * factor[:, :, None]
                    setattr(attention, f"{name}_bias", bias.replace(by_head.reshape(bias.shape)))
    return params
