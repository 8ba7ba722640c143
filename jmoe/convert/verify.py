"""Whether a run computes what the folder it came from says: logits, from the files themselves and by NumPy alone.

What follows is written from the families' own descriptions, and shares nothing with the conversion but the reading of
files, so that a mistake in one is no mistake in the other.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jmoe.config import InputError
from jmoe.convert.shards import Reader
from jmoe.language_model import LanguageModel

TOKENS = 32
LIMIT = 1e-4  # of the logits' largest magnitude; float32 on both sides


def verify(hf_dir: Path, run_dir: Path) -> str:
    """Compares the logits of both for some random tokens; says by how much they differ.

    Raises InputError if that is more than rounding explains.
    """
    settings = json.loads((hf_dir / "config.json").read_bytes())
    tokens = np.random.default_rng(0).integers(0, settings["vocab_size"], TOKENS, np.int32)
    expected = reference_logits(settings, Reader(hf_dir), tokens)
    found = np.asarray(LanguageModel.load(run_dir).logits(tokens[None]))[0]
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    told = f"logits of {TOKENS} random tokens differ by {difference:.1e} of the largest"
    if not difference <= LIMIT:
        raise InputError(f"{run_dir} does not compute what {hf_dir} says: {told}")
    return told


def reference_logits(
    settings: dict[str, Any], reader: Reader, tokens: Int[np.ndarray, " S"]
) -> Float[np.ndarray, "S V"]:
    """Logits, float32 [S, V], of one text of S tokens by the model of a folder's config.json and files."""
    known = reader.tensors.keys()
    settings, rules = described(settings)

    def read(name: str) -> np.ndarray:
        return reader.read(name).astype(np.float32)

    def linear(x: np.ndarray, name: str, bias: bool = True) -> np.ndarray:
        out = x @ read(f"{name}.weight").T
        return out + read(f"{name}.bias") if bias and f"{name}.bias" in known else out

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        eps = settings.get("rms_norm_eps", 1e-6)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * read(f"{name}.weight")

    def swiglu(x: np.ndarray, gate: str, up: str, down: str) -> np.ndarray:
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    heads = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    rope = settings.get("rope_parameters") or {}
    base = rope.get("rope_theta", settings.get("rope_theta", 10000.0))

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        q, k, v = (linear(x, f"{name}.{part}_proj") for part in "qkv")
        H = q.shape[-1] // heads
        if f"{name}.q_norm.weight" in known:
            whole = read(f"{name}.q_norm.weight").size == q.shape[-1] != H
            width_q, width_k = (q.shape[-1], k.shape[-1]) if whole else (H, H)
            q = norm(q.reshape(len(x), -1, width_q), f"{name}.q_norm")
            k = norm(k.reshape(len(x), -1, width_k), f"{name}.k_norm")
        q, k, v = (part.reshape(len(x), n, H) for part, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
        q, k = rotate(q, base), rotate(k, base)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(H)
        scores = np.where(np.tri(len(x), dtype=bool)[None], scores, -np.inf)
        return linear(np.einsum("nqk,knh->qnh", softmax(scores), v).reshape(len(x), -1), f"{name}.o_proj")

    def mixture(x: np.ndarray, name: str) -> np.ndarray:
        chosen, weights = route(x, name)
        out = np.zeros_like(x)
        for e in np.unique(chosen):
            rows, slots = np.nonzero((chosen == e) & (weights != 0))
            identity = layer in rules and e >= rules[layer]["num_experts"]
            out[rows] += weights[rows, slots][:, None] * (x[rows] if identity else expert(x[rows], name, int(e)))
        for shared in ("shared_expert", "shared_experts"):
            if f"{name}.{shared}.up_proj.weight" in known:
                y = swiglu(x, *(f"{name}.{shared}.{part}_proj" for part in ("gate", "up", "down")))
                gated = f"{name}.{shared}_gate.weight" in known
                out += y * sigmoid(linear(x, f"{name}.{shared}_gate")) if gated else y
        return out

    def expert(x: np.ndarray, name: str, e: int) -> np.ndarray:
        for parts in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
            names = [f"{name}.experts.{e}.{part}" for part in parts]
            if f"{names[0]}.weight" in known:
                return swiglu(x, *names)
        gate, up = np.split(x @ reader.read(f"{name}.experts.gate_up_proj", (e,)).astype(np.float32).T, 2, axis=-1)
        return (silu(gate) * up) @ reader.read(f"{name}.experts.down_proj", (e,)).astype(np.float32).T

    def route(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        if layer in rules:
            state = {part: read(f"{name}.router.{part}") for part in ("bias", "p") if f"{name}.router.{part}" in known}
            return route_by_rule(linear(x, f"{name}.router", bias=False), rules[layer]["router"] | state)
        logits, kind, k = linear(x, f"{name}.gate"), settings["model_type"], settings["num_experts_per_tok"]
        if kind not in ("dots1", "glm4_moe"):
            scores = ranked = softmax(logits)
        else:
            scores = sigmoid(logits)
            ranked = scores + read(f"{name}.gate.e_score_correction_bias")
            groups = ranked.reshape(len(x), settings.get("n_group") or 1, -1)
            of_group = np.sort(groups, -1)[..., -2:].sum(-1)
            best = np.argsort(-of_group, -1)[:, : settings.get("topk_group") or 1]
            allowed = (best[..., None] == np.arange(groups.shape[1])[None, None]).any(1)
            ranked = np.where(allowed[..., None], groups, -np.inf).reshape(ranked.shape)
        chosen = np.argsort(-ranked, -1, kind="stable")[:, :k]
        weights = np.take_along_axis(scores, chosen, -1)
        if kind == "mixtral" or settings.get("norm_topk_prob", kind == "glm4_moe"):
            weights = weights / weights.sum(-1, keepdims=True)
        return chosen, weights * settings.get("routed_scaling_factor", 1.0)

    x = read("model.embed_tokens.weight")[tokens]
    for layer in range(settings["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        before, after = (
            next(f"{name}.{norm}" for norm in norms if f"{name}.{norm}.weight" in known)
            for norms in (("input_layernorm", "input_norm"), ("post_attention_layernorm", "post_attention_norm"))
        )
        x = x + attention(norm(x, before), f"{name}.self_attn")
        h = norm(x, after)
        plain = next((mlp for mlp in (f"{name}.mlp", f"{name}.mlp.mlp") if f"{mlp}.gate_proj.weight" in known), None)
        if plain:
            x = x + swiglu(h, *(f"{plain}.{part}_proj" for part in ("gate", "up", "down")))
        else:
            block = "block_sparse_moe" if f"{name}.block_sparse_moe.gate.weight" in known else "mlp"
            x = x + mixture(h, f"{name}.{block}")
    head = "model.embed_tokens" if settings.get("tie_word_embeddings") else "lm_head"
    return linear(norm(x, "model.norm"), head)


def described(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """What config.json says of the model under the names of transformers, and for layers that choose experts by a rule
    of jmoe the rule and the number of experts."""
    if settings.get("architectures") == ["MoEForCausalLM"]:
        rule = {"kind": "Nucleus", "p": settings["top_p_threshold"], "max_slots": None}
        moe = {"router": rule, "num_experts": settings["num_experts"]}
        return settings, dict.fromkeys(range(0, settings["num_hidden_layers"], settings["expert_frequency"]), moe)
    if settings["model_type"] != "jmoe":
        return settings, {}
    own = settings["architecture"]
    layers = [layer for group in own["layers"] for _ in range(group["repeats"]) for layer in group["pattern"]]
    named = {
        "num_attention_heads": own["num_heads"],
        "num_key_value_heads": own["num_kv_heads"],
        "num_hidden_layers": len(layers),
        "rms_norm_eps": own["norm_eps"],
        "rope_theta": own["rope_base"],
        "tie_word_embeddings": own["tie_embeddings"],
    }
    return settings | named, {i: layer for i, layer in enumerate(layers) if layer["kind"] == "MoE"}


def route_by_rule(logits: np.ndarray, rule: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The choices of each token from the best on, and their weights, 0 where they are not chosen: [T, C] each, of
    logits [T, C] and a rule of jmoe with the `bias` and the `p` that training moved."""
    if rule["kind"] == "Nucleus":
        scores = softmax(logits)
        order = np.argsort(-scores, -1, kind="stable")
        weights = np.take_along_axis(scores, order, -1)
        before = np.pad(np.cumsum(weights, -1)[:, :-1], ((0, 0), (1, 0)))
        weights = np.where(before <= rule["p"], weights, 0)
        weights[:, rule["max_slots"] or logits.shape[1] :] = 0
        return order, weights
    scores = sigmoid(logits) if rule["score"] == "sigmoid" else softmax(logits)
    groups = (scores + rule.get("bias", 0)).reshape(len(logits), rule["groups"], -1)
    best = np.argsort(-np.sort(groups, -1)[..., -2:].sum(-1), -1, kind="stable")[:, : rule["groups_per_token"]]
    allowed = (best[..., None] == np.arange(rule["groups"])[None, None]).any(1)
    ranked = np.where(allowed[..., None], groups, -np.inf).reshape(logits.shape)
    order = np.argsort(-ranked, -1, kind="stable")
    weights = np.take_along_axis(scores, order, -1)
    weights[:, rule["k"] :] = 0
    if rule["renormalise"]:
        weights = weights / weights.sum(-1, keepdims=True)
    return order, weights * rule["scale"]


def rotate(x: Float[np.ndarray, "S N H"], base: float) -> Float[np.ndarray, "S N H"]:
    """Rotary positions in Llama's layout."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * base ** (-np.arange(half) / half)[None, None]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
