"""What a model is made of and what its routers do, as plain values for the log."""

from functools import cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jmoe import config
from jmoe.flops import feed_forwards, training_flops
from jmoe.model.router import RouterStats
from jmoe.model.transformer import MaxLogits, RouterState, RouterStates, Stats, Transformer, by_layer
from jmoe.sharding import is_variable

DEAD = 0.01
"""A choice of less than this part of an equal share is dead."""


@cache
def num_parameters(model: config.Model) -> int:
    """Parameters of the model, without the state of its routers."""
    shapes = jax.eval_shape(partial(Transformer, model), jax.random.key(0))
    variables = jax.tree.leaves(shapes, is_leaf=is_variable)
    return sum(variable.size for variable in variables if isinstance(variable, nnx.Param))


def num_expert_parameters(model: config.Model) -> int:
    """Parameters of the routed experts."""
    moe_layers = (layer for layer in feed_forwards(model) if isinstance(layer, config.MoE))
    return sum(3 * model.d_model * sum(layer.expert_widths) for layer in moe_layers)


def describe_model(model: config.Model) -> str:
    """A line on the architecture: layers and parameters, of which those of routed experts apart."""
    total, experts = num_parameters(model), num_expert_parameters(model)
    return f"model: {model.num_layers} layers, {total:,} parameters, {experts:,} of them in experts"


def describe_routing(
    model: config.Model, seq_len: int, stats: Stats, tokens: float, routers: RouterStates
) -> dict[str, Any]:
    """What the routers did, as plain values; empty for a model without MoE layers.

    Args:
      model: the architecture.
      seq_len: tokens that attention looks at, for the FLOPs.
      stats: sums over `tokens` valid tokens.
      routers: the state of the routers at the time.

    Returns:
      experts_per_token and dropped_per_token, means over the MoE layers.
      activated_parameters beside parameters: a mean over tokens of all but the routed experts a token does not go to.
      activated_flops_per_token beside flops_per_token, in which every token passes every expert: forward and backward,
      as `jmoe.flops` counts them.
      moe_layers, their indices, and for each the values of `describe_layer` as `NAME_by_layer`; what is None for all
      of them is left out.
    """
    sums = by_layer(model, jax.tree.map(lambda x: np.asarray(x, np.float64), stats))
    if not sums:
        return {}
    states = by_layer(model, jax.tree.map(np.asarray, routers))
    means = [(moe, jax.tree.map(lambda x: x / tokens, layer)) for _, moe, layer in sums]
    rows = [
        describe_layer(moe, model.d_model, mean, state)
        for (moe, mean), (_, _, state) in zip(means, states, strict=True)
    ]
    widths = [activated_width(moe, mean) for moe, mean in means]
    experts = 3 * model.d_model * sum(widths)
    return {
        "experts_per_token": np.float32(np.mean([row["experts_per_token"] for row in rows])),
        "dropped_per_token": np.float32(np.mean([row["dropped_per_token"] for row in rows])),
        "activated_parameters": np.float32(num_parameters(model) - num_expert_parameters(model) + experts),
        "parameters": num_parameters(model),
        "activated_flops_per_token": np.float32(training_flops(model, seq_len, widths)),
        "flops_per_token": np.float32(training_flops(model, seq_len)),
        "moe_layers": [index for index, _, _ in sums],
    } | {
        f"{name}_by_layer": [row[name] for row in rows]
        for name in rows[0]
        if any(row[name] is not None for row in rows)
    }


def describe_attention(max_logits: MaxLogits, threshold: float) -> dict[str, Any]:
    """The highest attention logit of each layer before the clip, over the heads, and of all; how many heads of all
    layers are clipped to the threshold."""
    heads = [np.asarray(layer)[repeat] for group in max_logits for repeat in range(len(group[0])) for layer in group]
    return {
        "max_attention_logit": np.max(heads),
        "max_attention_logit_by_layer": [row.max() for row in heads],
        "clipped_heads": int((np.array(heads) > threshold).sum()),
    }


def describe_layer(moe: config.MoE, d_model: int, mean: RouterStats, state: RouterState) -> dict[str, Any]:
    """What one router did; `mean` are its statistics over the tokens.

    Returns:
      experts_per_token: routed experts alone.
      experts_per_token_histogram: shares of the tokens that go to 0, 1, ... K routed experts.
      identity_per_token: identity experts; None where there are none.
      dropped_per_token: assignments left out for want of a slot, or of capacity on the expert's device.
      activated_expert_parameters: of the routed experts that a token goes to, and of the shared expert.
      load: share of the assignments of each choice, identity experts last. Balance is told by its coefficient of
      variation (load_cv), its highest value over its mean (load_max_over_mean) and the choices of less than a hundredth
      of an equal share (dead_experts).
      router_entropy: of the probabilities of a token, nats.
      router_bias_range: highest less lowest; None without a bias.
      nucleus_p: the threshold; None where it does not move.
    """
    assignments, E = mean.tokens_per_expert, moe.num_experts
    total = assignments.sum()
    load = assignments / (total or 1.0)
    relative = load * len(load)  # its mean is 1
    return {
        "experts_per_token": np.float32(assignments[:E].sum()),
        "experts_per_token_histogram": short(mean.tokens_per_count),
        "identity_per_token": np.float32(assignments[E:].sum()) if moe.identity_experts else None,
        "dropped_per_token": np.float32(mean.dropped),
        "activated_expert_parameters": np.float32(3 * d_model * (activated_width(moe, mean) + moe.shared_d_ff)),
        "load": short(load),
        "load_cv": np.float32(relative.std()),
        "load_max_over_mean": np.float32(relative.max()),
        "dead_experts": int((relative < DEAD).sum()),
        "router_entropy": np.float32(mean.entropy),
        "router_bias_range": None if state.bias is None else np.float32(state.bias.max() - state.bias.min()),
        "nucleus_p": None if state.p is None else np.float32(state.p),
    }


def activated_width(moe: config.MoE, mean: RouterStats) -> float:
    """Summed hidden widths of the routed experts that a token goes to, as a mean."""
    return float(mean.tokens_per_expert[: moe.num_experts] @ np.array(moe.expert_widths, np.float64))


def short(shares: np.ndarray | jax.Array) -> list[float]:
    """To six decimals: a line holds as many as the model has experts."""
    return np.round(shares, 6).tolist()
