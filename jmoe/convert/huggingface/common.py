"""What the config.json of all families have alike, and what none of them can say."""

from collections.abc import Iterable
from typing import Any

from jmoe import config
from jmoe.config import require
from jmoe.convert.layers import group_layers
from jmoe.flops import feed_forwards

Json = dict[str, Any]


class NotRepresented(ValueError):
    """What of a model a family cannot say, in a few words."""


def unless(said: bool, reason: str) -> None:
    if not said:
        raise NotRepresented(reason)


def common_to_json(model: config.Model) -> Json:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": model.rope_base,  # where transformers looks for it before version 5, and since
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
    }


def get(json: Json, key: str, kind: type, default: Any = None) -> Any:
    """json[key], which has to be of this kind; `default` where it is missing or null, unless that is None."""
    value = json.get(key)
    if value is None:
        require(default is not None, f"config.json has no {key}")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    require(type(value) is kind, f"config.json: {key} is {value!r}; it must be of type {kind.__name__}")
    return value


def common_from_json(json: Json, layers: Iterable[config.FeedForward], *, eps: float = 1e-6, **fields: Any):
    """The model with these layers. Refuses what no family's model in jmoe has."""
    width, heads = get(json, "hidden_size", int), get(json, "num_attention_heads", int)
    require(heads >= 1, f"config.json: num_attention_heads is {heads}")
    activation = json.get("hidden_act", "silu")
    require(activation == "silu", f"config.json: hidden_act = {activation!r} is not supported; only silu is")
    for key in ("mlp_bias", "clip_qkv", "quantization_config"):
        require(not json.get(key), f"config.json: {key} = {json.get(key)!r} is not supported")
    return config.Model(
        vocab_size=get(json, "vocab_size", int),
        d_model=width,
        num_heads=heads,
        num_kv_heads=get(json, "num_key_value_heads", int, heads),
        head_dim=get(json, "head_dim", int, width // heads),
        rope_base=_rope_base(json),
        norm_eps=get(json, "rms_norm_eps", float, eps),
        tie_embeddings=get(json, "tie_word_embeddings", bool, False),
        init_std=get(json, "initializer_range", float, 0.02),
        layers=group_layers(list(layers)),
        **fields,
    )


def _rope_base(json: Json) -> float:
    """The base of the rotary frequencies, wherever a version of transformers keeps it. Refuses any scaling of them."""
    rope = json.get("rope_parameters") or {}
    for name, settings in (("rope_parameters", rope), ("rope_scaling", json.get("rope_scaling") or {})):
        require(isinstance(settings, dict), f"config.json: {name} is {settings!r}; it must be an object")
        kind = settings.get("rope_type", settings.get("type", "default"))
        require(
            kind == "default", f"config.json: {name} of type {kind!r} is not supported; rotary positions as they are"
        )
    partial = rope.get("partial_rotary_factor", json.get("partial_rotary_factor", 1.0))
    require(partial == 1.0, f"config.json: partial_rotary_factor = {partial} is not supported; only 1.0 is")
    return get({"rope_theta": rope.get("rope_theta", json.get("rope_theta"))}, "rope_theta", float, 10000.0)


def num_experts(json: Json) -> int:
    """The number of routed experts: some versions of transformers write another name than the model's authors did."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    found = next((name for name in names if json.get(name) is not None), " or ".join(names))
    return get(json, found, int)


def refuse_bias(json: Json) -> None:
    require(not json.get("attention_bias"), "config.json: attention_bias = true (of the output too) is not supported")


def refuse_windows(json: Json, in_use: bool) -> None:
    """Refuses sliding windows; `in_use` if config.json switches them on where it does not list the layers."""
    types = json.get("layer_types")
    sliding = in_use if types is None else any(kind != "full_attention" for kind in types)
    require(
        not sliding, f"config.json: sliding_window = {json.get('sliding_window')} is not supported; attention is full"
    )


def dense_width(model: config.Model, layers: Iterable[config.FeedForward]) -> int:
    """Hidden width of the dense layers, which have to be alike; 1 if there are none."""
    widths = {each.d_ff for each in layers if isinstance(each, config.Dense)}
    unless(len(widths) <= 1, f"dense layers of {len(widths)} widths")
    return widths.pop() if widths else model.d_model


def mixture(layers: Iterable[config.FeedForward]) -> tuple[config.MoE, config.TopK]:
    """The settings of the MoE layers, which have to be alike, of the kind that every family has."""
    kinds = {each for each in layers if isinstance(each, config.MoE)}
    unless(len(kinds) > 0, "no MoE layer")
    unless(len(kinds) == 1, "MoE layers that differ")
    (moe,) = kinds
    unless(isinstance(moe.router, config.TopK), f"the router {type(moe.router).__name__}")
    assert isinstance(moe.router, config.TopK)
    unless(len(set(moe.expert_widths)) == 1, "experts of different widths")
    unless(moe.identity_experts == 0, "identity experts")
    return moe, moe.router


def plain_softmax(router: config.TopK) -> None:
    unless(router.score == "softmax", f"{router.score} scores")
    unless(router.scale == 1.0, "scaled combine weights")
    unless(router.groups == 1, "expert groups")
    unless(router.bias_rate == 0.0, "balancing by bias")


def norm_and_bias(model: config.Model, *, norm: str | None, bias: bool | None = False) -> None:
    """QK-norm over `norm` or none at all, and biases if `bias`; None for either."""
    over = model.qk_norm_over if model.qk_norm else None
    unless(over == norm, f"QK-norm over each {over}" if over else "no QK-norm")
    unless(bias is None or model.qkv_bias == bias, "biases" if model.qkv_bias else "no biases")


def window_never(_: Json) -> bool:
    return False


def window_if_given(json: Json) -> bool:
    return json.get("sliding_window") is not None


def window_if_used(json: Json) -> bool:
    return bool(json.get("use_sliding_window")) and json.get("sliding_window") is not None


def balance_to_json(settings: config.Config) -> Json:
    """The coefficient of the load-balance loss: transformers sums the shares of a token's experts, where jmoe takes
    their mean."""
    slots = [each.slots for each in feed_forwards(settings.model) if isinstance(each, config.MoE)]
    coefficient = settings.loss.load_balance_loss
    return {"router_aux_loss_coef": coefficient / max(slots), "output_router_logits": False} if slots else {}


def balance_from_json(json: Json, model: config.Model) -> config.Loss:
    """The reverse; routers that balance by a bias go without."""
    routers = [each.router for each in feed_forwards(model) if isinstance(each, config.MoE)]
    slots = [router.k for router in routers if isinstance(router, config.TopK) and not router.bias_rate]
    coefficient = json.get("router_aux_loss_coef") or 0.0
    return config.Loss(z_loss=0.0, load_balance_loss=coefficient * max(slots, default=0), dynamic_loss=0.0)
