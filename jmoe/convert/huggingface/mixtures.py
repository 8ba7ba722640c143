"""The families of mixtures: config.json ↔ `config.Model`."""

from typing import Any

from jmoe import config
from jmoe.config import require
from jmoe.convert.huggingface.common import (
    Json,
    common_from_json,
    common_to_json,
    dense_width,
    get,
    mixture,
    norm_and_bias,
    num_experts,
    plain_softmax,
    refuse_bias,
    refuse_windows,
    unless,
    window_if_given,
    window_if_used,
)
from jmoe.flops import feed_forwards


def mixtral_to_json(model: config.Model) -> Json:
    layers = feed_forwards(model)
    moe, router = mixture(layers)
    plain_softmax(router)
    norm_and_bias(model, norm=None)
    unless(not any(isinstance(each, config.Dense) for each in layers), "dense layers")
    unless(moe.shared_d_ff == 0, "a shared expert")
    unless(router.renormalise, "combine weights that are not renormalised")
    return {
        **common_to_json(model),
        "intermediate_size": moe.expert_widths[0],
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "sliding_window": None,
    }


def mixtral_from_json(json: Json) -> config.Model:
    refuse_bias(json)
    refuse_windows(json, window_if_given(json))
    router = config.TopK(get(json, "num_experts_per_tok", int, 2))
    moe = config.MoE(num_experts(json), get(json, "intermediate_size", int), router)
    layers = [moe] * get(json, "num_hidden_layers", int)
    return common_from_json(json, layers, eps=1e-5, qk_norm=False)


def olmoe_to_json(model: config.Model) -> Json:
    layers = feed_forwards(model)
    moe, router = mixture(layers)
    plain_softmax(router)
    norm_and_bias(model, norm="projection")
    unless(not any(isinstance(each, config.Dense) for each in layers), "dense layers")
    unless(moe.shared_d_ff == 0, "a shared expert")
    unless(model.num_heads * model.head_dim == model.d_model, "heads that are not as wide together as the model")
    common = common_to_json(model)
    del common["head_dim"]
    return {
        **common,
        "intermediate_size": moe.expert_widths[0],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalise,
        "clip_qkv": None,
    }


def olmoe_from_json(json: Json) -> config.Model:
    refuse_bias(json)
    router = config.TopK(get(json, "num_experts_per_tok", int, 8), renormalise=get(json, "norm_topk_prob", bool, False))
    moe = config.MoE(num_experts(json), get(json, "intermediate_size", int), router)
    layers = [moe] * get(json, "num_hidden_layers", int)
    return common_from_json(json, layers, eps=1e-5, qk_norm=True, qk_norm_over="projection")


def _qwen_moe_to_json(model: config.Model) -> Json:
    """What Qwen2-MoE and Qwen3-MoE have alike."""
    layers = feed_forwards(model)
    moe, router = mixture(layers)
    plain_softmax(router)
    return {
        **common_to_json(model),
        "intermediate_size": dense_width(model, layers),
        "moe_intermediate_size": moe.expert_widths[0],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, each in enumerate(layers) if isinstance(each, config.Dense)],
        "use_sliding_window": False,
    }


def qwen2_moe_to_json(model: config.Model) -> Json:
    norm_and_bias(model, norm=None, bias=None)
    moe, _ = mixture(feed_forwards(model))
    unless(moe.shared_gate, "no shared expert with a gate")
    shared = {"shared_expert_intermediate_size": moe.shared_d_ff, "qkv_bias": model.qkv_bias}
    return {**_qwen_moe_to_json(model), **shared}


def qwen3_moe_to_json(model: config.Model) -> Json:
    norm_and_bias(model, norm="head")
    moe, _ = mixture(feed_forwards(model))
    unless(moe.shared_d_ff == 0, "a shared expert")
    return _qwen_moe_to_json(model)


def _qwen_moe_layers(json: Json, k: int, **shared: Any) -> list[config.FeedForward]:
    router = config.TopK(get(json, "num_experts_per_tok", int, k), renormalise=get(json, "norm_topk_prob", bool, False))
    width = get(json, "moe_intermediate_size", int)
    moe = config.MoE(num_experts(json), width, router, **shared)
    dense, every = json.get("mlp_only_layers") or [], get(json, "decoder_sparse_step", int, 1)
    count = get(json, "num_hidden_layers", int)
    sparse = [i not in dense and every > 0 and (i + 1) % every == 0 for i in range(count)]
    return [moe if each else config.Dense(get(json, "intermediate_size", int)) for each in sparse]


def qwen2_moe_from_json(json: Json) -> config.Model:
    refuse_windows(json, window_if_used(json))
    shared = {"shared_d_ff": get(json, "shared_expert_intermediate_size", int, 5632), "shared_gate": True}
    layers = _qwen_moe_layers(json, 4, **shared)
    return common_from_json(json, layers, qk_norm=False, qkv_bias=get(json, "qkv_bias", bool, True))


def qwen3_moe_from_json(json: Json) -> config.Model:
    refuse_bias(json)
    refuse_windows(json, window_if_used(json))
    return common_from_json(json, _qwen_moe_layers(json, 8), qk_norm=True)


def _deepseek_to_json(model: config.Model) -> Json:
    """What dots1 and GLM-4-MoE have alike: the routing of DeepSeek-V3 with ordinary attention."""
    layers = feed_forwards(model)
    moe, router = mixture(layers)
    leading = next(i for i, each in enumerate(layers) if each == moe)
    width = moe.expert_widths[0]
    unless(router.score == "sigmoid", f"{router.score} scores")
    unless(moe.num_experts // router.groups >= 2, "groups of one expert")
    unless(all(each == moe for each in layers[leading:]), "dense layers after the first MoE layer")
    unless(moe.shared_d_ff > 0, "no shared expert")
    unless(moe.shared_d_ff % width == 0, "a shared expert that is not as wide as a number of experts")
    unless(not moe.shared_gate, "a shared expert with a gate")
    return {
        **common_to_json(model),
        "intermediate_size": dense_width(model, layers),
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


def dots1_to_json(model: config.Model) -> Json:
    norm_and_bias(model, norm="head")
    return {**_deepseek_to_json(model), "sliding_window": None}


def glm4_moe_to_json(model: config.Model) -> Json:
    norm_and_bias(model, norm="head" if model.qk_norm else None, bias=None)
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
        k=get(json, "num_experts_per_tok", int),
        score="sigmoid",
        renormalise=get(json, "norm_topk_prob", bool, False),
        scale=get(json, "routed_scaling_factor", float, 1.0),
        groups=get(json, "n_group", int, 1),
        groups_per_token=get(json, "topk_group", int, 1),
        bias_rate=1e-3,  # of training, which the file does not tell: DeepSeek-V3's
    )
    width = get(json, "moe_intermediate_size", int)
    shared = width * get(json, "n_shared_experts", int, 0)
    moe = config.MoE(num_experts(json), width, router, shared_d_ff=shared)
    leading, count = get(json, "first_k_dense_replace", int, dense), get(json, "num_hidden_layers", int)
    return [config.Dense(get(json, "intermediate_size", int))] * min(leading, count) + [moe] * max(count - leading, 0)


def dots1_from_json(json: Json) -> config.Model:
    refuse_bias(json)
    later = json.get("max_window_layers", 62) < get(json, "num_hidden_layers", int)
    refuse_windows(json, window_if_given(json) and later)
    return common_from_json(json, _deepseek_layers(json, 0), qk_norm=True)


def glm4_moe_from_json(json: Json) -> config.Model:
    rope = json.get("rope_parameters") or {}
    told = {"partial_rotary_factor": rope.get("partial_rotary_factor", json.get("partial_rotary_factor", 0.5))}
    norm, bias = get(json, "use_qk_norm", bool, False), get(json, "attention_bias", bool, False)
    return common_from_json(json | told, _deepseek_layers(json, 1), eps=1e-5, qk_norm=norm, qkv_bias=bias)
