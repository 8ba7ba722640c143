"""The layout of the nucleus paper's own code (arXiv 2403.07652, github.com/ZhenweiAn/Dynamic_MoE).

That code is for transformers 4. It computes with a rotary base of 10000 and with as many key heads as query heads,
whatever rope_theta and num_key_value_heads in its config.json are, so other values are refused. Where a token's
probabilities never sum to more than p, both it and jmoe take all experts.
"""

from dataclasses import asdict, dataclass

from jmoe import config
from jmoe.config import require
from jmoe.convert.huggingface.common import Json, NotRepresented, unless
from jmoe.convert.layers import group_layers
from jmoe.flops import feed_forwards
from jmoe.json_form import decode


@dataclass(frozen=True)
class Entries:
    """The entries of its config.json that say what a model is; those that are missing take its code's defaults."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    rope_scaling: None = None
    tie_word_embeddings: bool = False
    num_experts: int = -1
    expert_frequency: int = 2
    top_p_threshold: float = 0.4


def to_json(model: config.Model) -> Json:
    layers = feed_forwards(model)
    moe = layers[0]
    if not isinstance(moe, config.MoE):
        raise NotRepresented("the first layer is dense")
    rule, width = moe.router, moe.expert_widths[0]
    if not isinstance(rule, config.Nucleus):
        raise NotRepresented(f"the router {type(rule).__name__}")
    frequency = next((i for i, layer in enumerate(layers) if i and isinstance(layer, config.MoE)), len(layers))
    unless(rule.experts_per_token is None, "a moving threshold")
    unless(rule.slots(moe.num_choices) == rule.bound(moe.num_choices), "a limit to the slots of a token")
    unless(set(moe.expert_widths) == {width}, "experts of different widths")
    unless(moe.shared_d_ff == 0, "a shared expert")
    unless(moe.identity_experts == 0, "identity experts")
    unless(
        layers == [config.Dense(width) if i % frequency else moe for i in range(len(layers))],
        "layers other than an MoE every so many and between them dense ones as wide as an expert",
    )
    unless(model.num_kv_heads == model.num_heads, "fewer key heads than query heads")
    unless(model.num_heads * model.head_dim == model.d_model, "heads that are not as wide together as the model")
    unless(not model.qk_norm, "QK-norm")
    unless(not model.qkv_bias, "biases")
    unless(model.rope_base == Entries.rope_theta, "a rotary base other than 10000")
    entries = Entries(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        rms_norm_eps=model.norm_eps,
        initializer_range=model.init_std,
        tie_word_embeddings=model.tie_embeddings,
        num_experts=moe.num_experts,
        expert_frequency=frequency,
        top_p_threshold=rule.p,
    )
    return asdict(entries)


def from_json(json: Json) -> config.Model:
    known = {name: json[name] for name in Entries.__dataclass_fields__ if name in json}
    given = decode(known, Entries)
    heads, layers = given.num_attention_heads, given.num_hidden_layers
    require(given.hidden_act == "silu", f"config.json: hidden_act is {given.hidden_act}; jmoe has silu")
    require(
        given.rope_theta == Entries.rope_theta,
        f"config.json: rope_theta is {given.rope_theta}, which this layout's code ignores: it computes with 10000; "
        "write that if the model was trained so",
    )
    require(
        given.num_key_value_heads in (None, heads),
        f"config.json: num_key_value_heads is {given.num_key_value_heads}, which this layout's code ignores: it has "
        f"as many as query heads; write {heads} if the model was trained so",
    )
    for name in ("num_attention_heads", "num_hidden_layers", "expert_frequency"):
        require(getattr(given, name) >= 1, f"config.json: {name} is {getattr(given, name)}; it must be at least 1")
    require(
        given.hidden_size % heads == 0,
        f"config.json: hidden_size = {given.hidden_size} is not divisible by num_attention_heads = {heads}",
    )
    dense = config.Dense(given.intermediate_size)
    moe = config.MoE(given.num_experts, given.intermediate_size, config.Nucleus(given.top_p_threshold))
    every = given.expert_frequency
    return config.Model(
        vocab_size=given.vocab_size,
        d_model=given.hidden_size,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=given.hidden_size // heads,
        qk_norm=False,
        rope_base=given.rope_theta,
        norm_eps=given.rms_norm_eps,
        tie_embeddings=given.tie_word_embeddings,
        init_std=given.initializer_range,
        layers=group_layers([dense if i % every else moe for i in range(layers)]),
    )


def loss_to_json(_: config.Config) -> Json:
    """Nothing: that code has no such loss."""
    return {}


def loss_from_json(*_: object) -> config.Loss:
    """The paper's coefficients."""
    return config.Loss(z_loss=0.0, load_balance_loss=1e-2, dynamic_loss=1e-4)
