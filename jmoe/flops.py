"""Floating-point operations of a model, counted from its config.

Only matrix products count, a multiply-add as 2. Attention is charged for every key of the sequence, the half that the
causal mask hides included, as in PaLM's model FLOPs utilisation (arXiv 2204.02311, appendix B). What the backward pass
computes again is not charged.
"""

from collections.abc import Sequence

from jmoe import config


def forward_flops(model: config.Model, seq_len: int, activated_widths: Sequence[float] | None = None) -> float:
    """FLOPs per token of a forward pass.

    Args:
      model: the architecture.
      seq_len: tokens that attention looks at.
      activated_widths: for each MoE layer in order, the summed hidden widths of the routed experts that a token passes,
        a mean over tokens [features]; None as if every token passed all of them.
    """
    D, N, G, H = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
    attention = D * (N + 2 * G) * H + N * H * D + 2 * seq_len * N * H
    multiply_adds = float(model.num_layers * attention + D * model.vocab_size)
    layers = feed_forwards(model)
    if activated_widths is None:
        activated_widths = [sum(layer.expert_widths) for layer in layers if isinstance(layer, config.MoE)]
    routed = iter(activated_widths)
    for layer in layers:
        match layer:
            case config.Dense(d_ff=d_ff):
                multiply_adds += 3 * D * d_ff
            case config.MoE():
                multiply_adds += D * (layer.num_choices + layer.shared_gate)
                multiply_adds += 3 * D * (next(routed) + layer.shared_d_ff)
    return 2 * multiply_adds


def training_flops(model: config.Model, seq_len: int, activated_widths: Sequence[float] | None = None) -> float:
    """FLOPs per token of a training step, forward and backward: each product has two more, for its two gradients.

    Arguments as in `forward_flops`.
    """
    return 3 * forward_flops(model, seq_len, activated_widths)


def feed_forwards(model: config.Model) -> list[config.FeedForward]:
    """The feed-forward of every layer, in order."""
    return [layer for group in model.layers for _ in range(group.repeats) for layer in group.pattern]


def places(model: config.Model) -> list[tuple[int, int, int]]:
    """Where the parameters of every layer are stored, in order: its group, its place in the pattern, its repeat."""
    return [
        (g, i, repeat)
        for g, group in enumerate(model.layers)
        for repeat in range(group.repeats)
        for i in range(len(group.pattern))
    ]
