"""The families' names of tensors; `jmoe.convert.mapping.Table` says what these tables are."""

from jmoe.convert.mapping import Table

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

# jmoe's own modelling file, and the code of the nucleus paper.
OWN = {
    **LLAMA,
    "feed_forward/router/weight": _LAYER + "mlp.router.weight",
    "feed_forward/router/bias": _LAYER + "mlp.router.bias",
    "feed_forward/router/p": _LAYER + "mlp.router.p",
    **_swiglu("feed_forward/experts", "mlp.experts.{expert}"),
    **_swiglu("feed_forward/shared/swiglu", "mlp.shared_expert"),
    "feed_forward/shared/weight": _LAYER + "mlp.shared_expert_gate.weight",
}
DYNAMIC_MOE = {
    **_ATTENTION,
    "attention_norm/gain": _LAYER + "input_norm.weight",
    "feed_forward_norm/gain": _LAYER + "post_attention_norm.weight",
    **_swiglu("feed_forward", "mlp.mlp"),
    "feed_forward/router/weight": _LAYER + "mlp.router.weight",
    **_swiglu("feed_forward/experts", "mlp.experts.{expert}"),
}
