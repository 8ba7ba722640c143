"""The Hugging Face families: which one is which `config.Model`, and how it names its tensors.

A family is chosen by what a model is, never by what it is called. Each has a table of names, and two functions between
`config.Model` and the entries of its config.json, each the other's reverse.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jmoe import config
from jmoe.config import InputError, require
from jmoe.convert.layers import group_layers
from jmoe.convert.mapping import Table

Json = dict[str, Any]


class NotRepresented(ValueError):
    """What of a model a family cannot say, in a few words."""


@dataclass(frozen=True)
class Family:
    """A model class of transformers."""

    model_type: str
    """`model_type` of its config.json"""
    architecture: str
    """the class, in `architectures` of its config.json"""
    table: Table
    """its names of the parameters"""
    to_json: Callable[[config.Model], Json]
    """the entries of config.json that say what the model is; raises NotRepresented"""
    from_json: Callable[[Json], config.Model]
    """the reverse; raises InputError for what jmoe lacks"""


def family_of(model: config.Model) -> tuple[Family, Json]:
    """The first family that represents the model exactly, and the entries of its config.json.

    Raises NotRepresented with what is in the way of each.
    """
    reasons = []
    for family in FAMILIES:
        try:
            return family, family.to_json(model)
        except NotRepresented as reason:
            reasons.append(f"{family.model_type}: {reason}")
    raise NotRepresented("; ".join(reasons))


# --------------------------------------------------------------------------------------------------------------- names

_LAYER = "model.layers.{layer}."
_ATTENTION = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm/gain": "model.norm.weight",
    "attention_norm/gain": _LAYER + "input_layernorm.weight",
    "feed_forward_norm/gain": _LAYER + "post_attention_layernorm.weight",
    "attention/query": _LAYER + "self_attn.q_proj.weight",
    "attention/key": _LAYER + "self_attn.k_proj.weight",
    "attention/value": _LAYER + "self_attn.v_proj.weight",
    "attention/out": _LAYER + "self_attn.o_proj.weight",
    "attention/query_bias": _LAYER + "self_attn.q_proj.bias",
    "attention/key_bias": _LAYER + "self_attn.k_proj.bias",
    "attention/value_bias": _LAYER + "self_attn.v_proj.bias",
    "attention/query_norm/gain": _LAYER + "self_attn.q_norm.weight",
    "attention/key_norm/gain": _LAYER + "self_attn.k_norm.weight",
}


def _swiglu(ours: str, theirs: str) -> Table:
    return {f"{ours}/{name}": f"{_LAYER}{theirs}.{name}_proj.weight" for name in ("gate", "up", "down")}


LLAMA = {**_ATTENTION, **_swiglu("feed_forward", "mlp")}
MIXTRAL = {
    **_ATTENTION,
    "feed_forward/router/weight": _LAYER + "block_sparse_moe.gate.weight",
    "feed_forward/experts/gate": _LAYER + "block_sparse_moe.experts.{expert}.w1.weight",
    "feed_forward/experts/up": _LAYER + "block_sparse_moe.experts.{expert}.w3.weight",
    "feed_forward/experts/down": _LAYER + "block_sparse_moe.experts.{expert}.w2.weight",
}
QWEN_MOE = {
    **LLAMA,
    "feed_forward/router/weight": _LAYER + "mlp.gate.weight",
    **_swiglu("feed_forward/experts", "mlp.experts.{expert}"),
    **_swiglu("feed_forward/shared/swiglu", "mlp.shared_expert"),
    "feed_forward/shared/weight": _LAYER + "mlp.shared_expert_gate.weight",
}
DEEPSEEK = {
    **LLAMA,
    "feed_forward/router/weight": _LAYER + "mlp.gate.weight",
    "feed_forward/router/bias": _LAYER + "mlp.gate.e_score_correction_bias",
    **_swiglu("feed_forward/experts", "mlp.experts.{expert}"),
    **_swiglu("feed_forward/shared/swiglu", "mlp.shared_experts"),
}


# ------------------------------------------------------------------------------------------------- what all have alike


def _unless(said: bool, reason: str) -> None:
    if not said:
        raise NotRepresented(reason)


def _common_to_json(model: config.Model) -> Json:
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


def _get(json: Json, key: str, kind: type, default: Any = None) -> Any:
    """json[key], which has to be of this kind; `default` where it is missing or null, unless that is None."""
    value = json.get(key)
    if value is None:
        require(default is not None, f"config.json has no {key}")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    require(type(value) is kind, f"config.json: {key} is {value!r}; it must be of type {kind.__name__}")
    return value


def _common_from_json(json: Json, layers: Iterable[config.FeedForward], *, eps: float = 1e-6, **fields: Any):
    """The model with these layers. Refuses what no family's model in jmoe has."""
    width, heads = _get(json, "hidden_size", int), _get(json, "num_attention_heads", int)
    require(heads >= 1, f"config.json: num_attention_heads is {heads}")
    activation = json.get("hidden_act", "silu")
    require(activation == "silu", f"config.json: hidden_act = {activation!r} is not supported; only silu is")
    for key in ("mlp_bias", "clip_qkv", "quantization_config"):
        require(not json.get(key), f"config.json: {key} = {json.get(key)!r} is not supported")
    return config.Model(
        vocab_size=_get(json, "vocab_size", int),
        d_model=width,
        num_heads=heads,
        num_kv_heads=_get(json, "num_key_value_heads", int, heads),
        head_dim=_get(json, "head_dim", int, width // heads),
        rope_base=_rope_base(json),
        norm_eps=_get(json, "rms_norm_eps", float, eps),
        tie_embeddings=_get(json, "tie_word_embeddings", bool, False),
        init_std=_get(json, "initializer_range", float, 0.02),
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
    return _get({"rope_theta": rope.get("rope_theta", json.get("rope_theta"))}, "rope_theta", float, 10000.0)


def _num_experts(json: Json) -> int:
    """The number of routed experts: some versions of transformers write another name than the model's authors did."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    found = next((name for name in names if json.get(name) is not None), " or ".join(names))
    return _get(json, found, int)


def _refuse_bias(json: Json) -> None:
    require(not json.get("attention_bias"), "config.json: attention_bias = true (of the output too) is not supported")


def _refuse_windows(json: Json, in_use: bool) -> None:
    """Refuses sliding windows; `in_use` if config.json switches them on where it does not list the layers."""
    types = json.get("layer_types")
    sliding = in_use if types is None else any(kind != "full_attention" for kind in types)
    require(
        not sliding, f"config.json: sliding_window = {json.get('sliding_window')} is not supported; attention is full"
    )


def _dense(model: config.Model, feed_forwards: Iterable[config.FeedForward]) -> int:
    """Hidden width of the dense layers, which have to be alike; 1 if there are none."""
    widths = {each.d_ff for each in feed_forwards if isinstance(each, config.Dense)}
    _unless(len(widths) <= 1, f"dense layers of {len(widths)} widths")
    return widths.pop() if widths else model.d_model


def _mixture(feed_forwards: Iterable[config.FeedForward]) -> tuple[config.MoE, config.TopK]:
    """The settings of the MoE layers, which have to be alike, of the kind that every family has."""
    kinds = {each for each in feed_forwards if isinstance(each, config.MoE)}
    _unless(len(kinds) > 0, "no MoE layer")
    _unless(len(kinds) == 1, "MoE layers that differ")
    (moe,) = kinds
    _unless(isinstance(moe.router, config.TopK), f"the router {type(moe.router).__name__}")
    assert isinstance(moe.router, config.TopK)
    _unless(len(set(moe.expert_widths)) == 1, "experts of different widths")
    _unless(moe.identity_experts == 0, "identity experts")
    return moe, moe.router


def _softmax(router: config.TopK) -> None:
    _unless(router.score == "softmax", f"{router.score} scores")
    _unless(router.scale == 1.0, "scaled combine weights")
    _unless(router.groups == 1, "expert groups")
    _unless(router.bias_rate == 0.0, "balancing by bias")


def _norm_and_bias(model: config.Model, *, norm: str | None, bias: bool | None = False) -> None:
    """QK-norm over `norm` or none at all, and biases if `bias`; None for either."""
    over = model.qk_norm_over if model.qk_norm else None
    _unless(over == norm, f"QK-norm over each {over}" if over else "no QK-norm")
    _unless(bias is None or model.qkv_bias == bias, "biases" if model.qkv_bias else "no biases")


def feed_forwards(model: config.Model) -> list[config.FeedForward]:
    """The feed-forward of each layer, in order."""
    return [each for group in model.layers for _ in range(group.repeats) for each in group.pattern]


# --------------------------------------------------------------------------------------------------------------- dense


def _dense_to_json(norm: str | None, bias: bool, extra: Json) -> Callable[[config.Model], Json]:
    def to_json(model: config.Model) -> Json:
        layers = feed_forwards(model)
        _unless(all(isinstance(each, config.Dense) for each in layers), "MoE layers")
        _norm_and_bias(model, norm=norm, bias=bias)
        _unless(norm is not None or bias or model.d_model % model.num_heads == 0, "d_model not a multiple of num_heads")
        return {**_common_to_json(model), "intermediate_size": _dense(model, layers), **extra}

    return to_json


def _dense_from_json(windows: Callable[[Json], bool], **fields: Any) -> Callable[[Json], config.Model]:
    def from_json(json: Json) -> config.Model:
        _refuse_bias(json)
        _refuse_windows(json, windows(json))
        layer = config.Dense(_get(json, "intermediate_size", int))
        head_dim = {"head_dim": 128} if "head_dim" not in json and fields.get("qk_norm") else {}
        return _common_from_json(json | head_dim, [layer] * _get(json, "num_hidden_layers", int), **fields)

    return from_json


def _never(_: Json) -> bool:
    return False


def _if_given(json: Json) -> bool:
    return json.get("sliding_window") is not None


def _if_used(json: Json) -> bool:
    return bool(json.get("use_sliding_window")) and json.get("sliding_window") is not None


# --------------------------------------------------------------------------------------------------------- mixtures


def _mixtral_to_json(model: config.Model) -> Json:
    layers = feed_forwards(model)
    moe, router = _mixture(layers)
    _softmax(router)
    _norm_and_bias(model, norm=None)
    _unless(not any(isinstance(each, config.Dense) for each in layers), "dense layers")
    _unless(moe.shared_d_ff == 0, "a shared expert")
    _unless(router.renormalise, "combine weights that are not renormalised")
    return {
        **_common_to_json(model),
        "intermediate_size": moe.expert_widths[0],
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "sliding_window": None,
    }


def _mixtral_from_json(json: Json) -> config.Model:
    _refuse_bias(json)
    _refuse_windows(json, _if_given(json))
    router = config.TopK(_get(json, "num_experts_per_tok", int, 2))
    moe = config.MoE(_num_experts(json), _get(json, "intermediate_size", int), router)
    layers = [moe] * _get(json, "num_hidden_layers", int)
    return _common_from_json(json, layers, eps=1e-5, qk_norm=False)


def _olmoe_to_json(model: config.Model) -> Json:
    layers = feed_forwards(model)
    moe, router = _mixture(layers)
    _softmax(router)
    _norm_and_bias(model, norm="projection")
    _unless(not any(isinstance(each, config.Dense) for each in layers), "dense layers")
    _unless(moe.shared_d_ff == 0, "a shared expert")
    _unless(model.num_heads * model.head_dim == model.d_model, "heads that are not as wide together as the model")
    common = _common_to_json(model)
    del common["head_dim"]
    return {
        **common,
        "intermediate_size": moe.expert_widths[0],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalise,
        "clip_qkv": None,
    }


def _olmoe_from_json(json: Json) -> config.Model:
    _refuse_bias(json)
    router = config.TopK(
        _get(json, "num_experts_per_tok", int, 8), renormalise=_get(json, "norm_topk_prob", bool, False)
    )
    moe = config.MoE(_num_experts(json), _get(json, "intermediate_size", int), router)
    layers = [moe] * _get(json, "num_hidden_layers", int)
    return _common_from_json(json, layers, eps=1e-5, qk_norm=True, qk_norm_over="projection")


def _qwen_moe_to_json(model: config.Model) -> Json:
    """What Qwen2-MoE and Qwen3-MoE have alike."""
    layers = feed_forwards(model)
    moe, router = _mixture(layers)
    _softmax(router)
    return {
        **_common_to_json(model),
        "intermediate_size": _dense(model, layers),
        "moe_intermediate_size": moe.expert_widths[0],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, each in enumerate(layers) if isinstance(each, config.Dense)],
        "use_sliding_window": False,
    }


def _qwen2_moe_to_json(model: config.Model) -> Json:
    _norm_and_bias(model, norm=None, bias=None)
    moe, _ = _mixture(feed_forwards(model))
    _unless(moe.shared_gate, "no shared expert with a gate")
    shared = {"shared_expert_intermediate_size": moe.shared_d_ff, "qkv_bias": model.qkv_bias}
    return {**_qwen_moe_to_json(model), **shared}


def _qwen3_moe_to_json(model: config.Model) -> Json:
    _norm_and_bias(model, norm="head")
    moe, _ = _mixture(feed_forwards(model))
    _unless(moe.shared_d_ff == 0, "a shared expert")
    return _qwen_moe_to_json(model)


def _qwen_moe_layers(json: Json, k: int, **shared: Any) -> list[config.FeedForward]:
    router = config.TopK(
        _get(json, "num_experts_per_tok", int, k), renormalise=_get(json, "norm_topk_prob", bool, False)
    )
    width = _get(json, "moe_intermediate_size", int)
    moe = config.MoE(_num_experts(json), width, router, **shared)
    dense, every = json.get("mlp_only_layers") or [], _get(json, "decoder_sparse_step", int, 1)
    count = _get(json, "num_hidden_layers", int)
    sparse = [i not in dense and every > 0 and (i + 1) % every == 0 for i in range(count)]
    return [moe if each else config.Dense(_get(json, "intermediate_size", int)) for each in sparse]


def _qwen2_moe_from_json(json: Json) -> config.Model:
    _refuse_windows(json, _if_used(json))
    shared = {"shared_d_ff": _get(json, "shared_expert_intermediate_size", int, 5632), "shared_gate": True}
    layers = _qwen_moe_layers(json, 4, **shared)
    return _common_from_json(json, layers, qk_norm=False, qkv_bias=_get(json, "qkv_bias", bool, True))


def _qwen3_moe_from_json(json: Json) -> config.Model:
    _refuse_bias(json)
    _refuse_windows(json, _if_used(json))
    return _common_from_json(json, _qwen_moe_layers(json, 8), qk_norm=True)


def _deepseek_to_json(model: config.Model) -> Json:
    """What dots1 and GLM-4-MoE have alike: the routing of DeepSeek-V3 with ordinary attention."""
    layers = feed_forwards(model)
    moe, router = _mixture(layers)
    leading = next(i for i, each in enumerate(layers) if each == moe)
    width = moe.expert_widths[0]
    _unless(router.score == "sigmoid", f"{router.score} scores")
    _unless(moe.num_experts // router.groups >= 2, "groups of one expert")
    _unless(all(each == moe for each in layers[leading:]), "dense layers after the first MoE layer")
    _unless(moe.shared_d_ff > 0, "no shared expert")
    _unless(moe.shared_d_ff % width == 0, "a shared expert that is not as wide as a number of experts")
    _unless(not moe.shared_gate, "a shared expert with a gate")
    return {
        **_common_to_json(model),
        "intermediate_size": _dense(model, layers),
        "moe_intermediate_size": width,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_d_ff // width,
        "num_experts_per_tok": router.k,
        "n_group": router.groups,
        "topk_group": router.groups_per_token,
        "norm_topk_prob": router.renormalise,
        "routed_scaling_factor": router.scale,
        "first_k_dense_replace": leading,
        "scoring_func": "sigmoid",
    }


def _dots1_to_json(model: config.Model) -> Json:
    _norm_and_bias(model, norm="head")
    return {**_deepseek_to_json(model), "sliding_window": None}


def _glm4_moe_to_json(model: config.Model) -> Json:
    _norm_and_bias(model, norm="head" if model.qk_norm else None, bias=None)
    common = _deepseek_to_json(model)
    rope = {"partial_rotary_factor": 1.0}
    return {
        **common,
        **rope,
        "rope_parameters": common["rope_parameters"] | rope,
        "use_qk_norm": model.qk_norm,
        "attention_bias": model.qkv_bias,
        "num_nextn_predict_layers": 0,
    }


def _deepseek_layers(json: Json, dense: int) -> list[config.FeedForward]:
    scoring = json.get("scoring_func", "sigmoid")
    require(scoring == "sigmoid", f"config.json: scoring_func = {scoring!r} is not supported; only sigmoid is")
    router = config.TopK(
        k=_get(json, "num_experts_per_tok", int),
        score="sigmoid",
        renormalise=_get(json, "norm_topk_prob", bool, False),
        scale=_get(json, "routed_scaling_factor", float, 1.0),
        groups=_get(json, "n_group", int, 1),
        groups_per_token=_get(json, "topk_group", int, 1),
        bias_rate=1e-3,  # of training, which the file does not tell: DeepSeek-V3's
    )
    width = _get(json, "moe_intermediate_size", int)
    shared = width * _get(json, "n_shared_experts", int, 0)
    moe = config.MoE(_num_experts(json), width, router, shared_d_ff=shared)
    leading, count = _get(json, "first_k_dense_replace", int, dense), _get(json, "num_hidden_layers", int)
    return [config.Dense(_get(json, "intermediate_size", int))] * min(leading, count) + [moe] * max(count - leading, 0)


def _dots1_from_json(json: Json) -> config.Model:
    _refuse_bias(json)
    later = json.get("max_window_layers", 62) < _get(json, "num_hidden_layers", int)
    _refuse_windows(json, _if_given(json) and later)
    return _common_from_json(json, _deepseek_layers(json, 0), qk_norm=True)


def _glm4_moe_from_json(json: Json) -> config.Model:
    rope = json.get("rope_parameters") or {}
    told = {"partial_rotary_factor": rope.get("partial_rotary_factor", json.get("partial_rotary_factor", 0.5))}
    norm, bias = _get(json, "use_qk_norm", bool, False), _get(json, "attention_bias", bool, False)
    return _common_from_json(json | told, _deepseek_layers(json, 1), eps=1e-5, qk_norm=norm, qkv_bias=bias)


_WINDOWLESS = {"use_sliding_window": False}
FAMILIES = (
    Family(
        *("llama", "LlamaForCausalLM", LLAMA),
        _dense_to_json(None, False, {"mlp_bias": False}),
        _dense_from_json(_never, qk_norm=False),
    ),
    Family(
        *("mistral", "MistralForCausalLM", LLAMA),
        _dense_to_json(None, False, {"sliding_window": None}),
        _dense_from_json(_if_given, qk_norm=False),
    ),
    Family(
        *("qwen2", "Qwen2ForCausalLM", LLAMA),
        _dense_to_json(None, True, _WINDOWLESS),
        _dense_from_json(_if_used, qk_norm=False, qkv_bias=True),
    ),
    Family(
        *("qwen3", "Qwen3ForCausalLM", LLAMA),
        _dense_to_json("head", False, _WINDOWLESS),
        _dense_from_json(_if_used, qk_norm=True),
    ),
    Family("mixtral", "MixtralForCausalLM", MIXTRAL, _mixtral_to_json, _mixtral_from_json),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", QWEN_MOE, _qwen2_moe_to_json, _qwen2_moe_from_json),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", QWEN_MOE, _qwen3_moe_to_json, _qwen3_moe_from_json),
    Family("olmoe", "OlmoeForCausalLM", QWEN_MOE, _olmoe_to_json, _olmoe_from_json),
    Family("dots1", "Dots1ForCausalLM", DEEPSEEK, _dots1_to_json, _dots1_from_json),
    Family("glm4_moe", "Glm4MoeForCausalLM", DEEPSEEK, _glm4_moe_to_json, _glm4_moe_from_json),
)


def family_named(json: Json) -> Family:
    """The family that a config.json says it is of. Raises InputError if jmoe does not know it."""
    kind, classes = json.get("model_type"), json.get("architectures") or []
    known = ", ".join(family.model_type for family in FAMILIES)
    for family in FAMILIES:
        if family.model_type == kind:
            right = classes in ([], [family.architecture])
            require(right, f"config.json: architectures = {classes} is not supported; {family.architecture} is")
            return family
    raise InputError(f"config.json: model_type = {kind!r} is not supported; it must be one of {known}")
