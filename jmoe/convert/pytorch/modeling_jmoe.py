"""A model trained with jmoe, in PyTorch: `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`.

Needs torch and transformers 5, nothing else, and is one file, to be copied beside weights. It has every kind of layer
that jmoe has: dense and mixture-of-experts layers in any order, experts of equal or different widths, top-k and nucleus
routers, a shared expert, identity experts.

Letters in comments: B sequences, S tokens of a call, L tokens with those in the cache, T = B·S, D hidden size, N query
heads, G key heads, H head size, E experts, C choices of a router (the experts, then the identity experts).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

# Hidden widths of 8 experts relative to one another (arXiv 2408.10681).
RELATIVE_WIDTHS = {
    "arithmetic": (9, 11, 13, 15, 17, 19, 21, 23),
    "geometric": (1, 2, 4, 8, 16, 32, 64, 128),
    "hybrid": (1, 1, 1, 1, 2, 2, 4, 4),
}


class JmoeConfig(PreTrainedConfig):
    """`architecture` and `loss` are the parts `model` and `loss` of the config.json of a jmoe run, as they stand there.

    What transformers knows under names of its own (hidden_size, ...) follows from `architecture`.
    """

    model_type = "jmoe"
    keys_to_ignore_at_inference = ("past_key_values", "terms", "routers")

    def __init__(self, architecture: dict[str, Any] | None = None, loss: dict[str, float] | None = None, **kwargs: Any):
        self.architecture = architecture
        self.loss = loss or {}
        if architecture is not None:
            kwargs |= {
                "vocab_size": architecture["vocab_size"],
                "hidden_size": architecture["d_model"],
                "num_hidden_layers": sum(len(g["pattern"]) * g["repeats"] for g in architecture["layers"]),
                "num_attention_heads": architecture["num_heads"],
                "num_key_value_heads": architecture["num_kv_heads"],
                "head_dim": architecture["head_dim"],
                "rms_norm_eps": architecture["norm_eps"],
                "initializer_range": architecture["init_std"],
                "tie_word_embeddings": architecture["tie_embeddings"],
            }
        super().__init__(**kwargs)


class Layout(NamedTuple):
    """A layer's place in the architecture, where layer groups are patterns that repeat."""

    place: tuple[int, int]
    """the group and the place in its pattern: the repeats of one layer have it in common"""
    feed_forward: dict[str, Any]


def layouts(architecture: dict[str, Any]) -> list[Layout]:
    """The layers in order."""
    return [
        Layout((g, i), feed_forward)
        for g, group in enumerate(architecture["layers"])
        for _ in range(group["repeats"])
        for i, feed_forward in enumerate(group["pattern"])
    ]


def expert_widths(moe: dict[str, Any]) -> list[int]:
    """The hidden width of each expert, from narrow to wide; proportions are rounded so that the total holds."""
    d_ff, experts = moe["d_ff"], moe["num_experts"]
    if isinstance(d_ff, list):
        return d_ff
    if moe["widths"] == "equal":
        return [d_ff] * experts
    relative, total = RELATIVE_WIDTHS[moe["widths"]], 8 * d_ff
    ends = [total * sum(relative[:e]) // sum(relative) for e in range(9)]
    widths = sorted(end - start for start, end in zip(ends, ends[1:]))  # noqa: B905, RUF007
    return [width for width in widths for _ in range(experts // 8)]


# ---------------------------------------------------------------------------------------------------- layers, attention


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normalised = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (normalised * self.weight.float()).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU: a dense feed-forward, and each expert."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Where(NamedTuple):
    """Where the tokens of a call stand, the same for every layer."""

    cos: Tensor
    """[B, 1, S, H/2], of the rotary angles"""
    sin: Tensor
    visible: Tensor
    """bool [B, 1, S, L]: whether a token sees a key"""
    valid: Tensor
    """bool [B, S]: no padding"""


def where(config: JmoeConfig, mask: Tensor, positions: Tensor, past: int) -> Where:
    """From a mask [B, L], 0 for padding, else 1 or the number of the token's document, and positions [B, S]."""
    half = config.head_dim // 2
    frequencies = config.architecture["rope_base"] ** (-torch.arange(half, device=mask.device).float() / half)
    angles = positions[:, None, :, None].float() * frequencies
    row = torch.arange(mask.shape[1], device=mask.device)
    own = mask[:, past:]
    # Padding sees padding, so that no token sees nothing.
    visible = (own[:, :, None] == mask[:, None, :]) & (row[past:, None] >= row)
    return Where(angles.cos(), angles.sin(), visible[:, None], own > 0)


def rotate(x: Tensor, place: Where) -> Tensor:
    """Rotary positions of heads [B, N, S, H], in the half-split layout of Llama."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * place.cos - b * place.sin, b * place.cos + a * place.sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention within documents."""

    def __init__(self, config: JmoeConfig, index: int):
        super().__init__()
        D, H = config.hidden_size, config.head_dim
        N, G = config.num_attention_heads, config.num_key_value_heads
        self.index, self.head_dim = index, H
        qkv_bias = config.architecture["qkv_bias"]
        self.q_proj = nn.Linear(D, N * H, bias=qkv_bias)
        self.k_proj = nn.Linear(D, G * H, bias=qkv_bias)
        self.v_proj = nn.Linear(D, G * H, bias=qkv_bias)
        self.o_proj = nn.Linear(N * H, D, bias=False)
        self.q_norm = self.k_norm = None
        if config.architecture["qk_norm"]:
            of_head = config.architecture["qk_norm_over"] == "head"
            self.q_norm = RMSNorm(H if of_head else N * H, config.rms_norm_eps)
            self.k_norm = RMSNorm(H if of_head else G * H, config.rms_norm_eps)

    def heads(self, projected: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """[B, S, N·H] to [B, N, S, H], normalised head by head or all together, as the norm is."""
        if norm is not None:
            projected = norm(projected.unflatten(-1, (-1, norm.weight.numel()))).flatten(-2)
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, place: Where, cache: Cache | None) -> Tensor:
        q = rotate(self.heads(self.q_proj(x), self.q_norm), place)
        k = rotate(self.heads(self.k_proj(x), self.k_norm), place)
        v = self.heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=place.visible, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


# -------------------------------------------------------------------------------------------------- mixture of experts


class RouterStats(NamedTuple):
    """Sums over the tokens of a call that are no padding, of one layer; float32."""

    tokens_per_choice: Tensor
    """[C]: assignments"""
    probability_per_choice: Tensor
    """[C]"""
    entropy: Tensor
    """of the tokens' probabilities, nats"""
    z_squared: Tensor
    """squared log-partition of the logits"""
    sequence_balance: Tensor
    """load-balance loss of each sequence times its tokens"""
    num_tokens: Tensor


class Router(nn.Module):
    """Which experts a token goes to, and with what weight: in float32, whatever the dtype of the model."""

    def __init__(self, size: int, moe: dict[str, Any]):
        super().__init__()
        self.rule, self.num_experts = moe["router"], moe["num_experts"]
        choices = moe["num_experts"] + moe["identity_experts"]
        self.weight = nn.Parameter(torch.empty(choices, size))
        bias = p = None
        if self.rule["kind"] == "TopK" and self.rule["bias_rate"] > 0:
            bias = torch.zeros(choices)
        if self.rule["kind"] == "Nucleus" and self.rule["experts_per_token"] is not None:
            p = torch.tensor(float(self.rule["p"]))
        # What training moves without a gradient: `JmoeForCausalLM.update_routers`.
        self.register_buffer("bias", bias)
        self.register_buffer("p", p)

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, RouterStats]:
        """For x [B, S, D]: the weight of each choice, float32 [B, S, C]; whether it is chosen, bool; the statistics."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        sigmoid = self.rule.get("score") == "sigmoid"
        log_probabilities = F.log_softmax(F.logsigmoid(logits) if sigmoid else logits, dim=-1)
        probabilities = log_probabilities.exp()
        if self.rule["kind"] == "TopK":
            weights, chosen = self.top_k(logits.sigmoid() if sigmoid else probabilities)
        else:
            weights, chosen = self.nucleus(probabilities)

        weights, chosen = weights * valid[..., None], chosen & valid[..., None]
        of_sequence = (probabilities * valid[..., None]).sum(1)
        counts = chosen.sum(1, dtype=torch.float32)
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        stats = RouterStats(
            tokens_per_choice=counts.sum(0),
            probability_per_choice=of_sequence.sum(0),
            entropy=-((probabilities * log_probabilities).sum(-1) * valid).sum(),
            z_squared=(logits.logsumexp(-1).square() * valid).sum(),
            sequence_balance=counts.shape[-1] * (share * of_sequence).sum(),
            num_tokens=valid.sum(dtype=torch.float32),
        )
        return weights, chosen, stats

    def top_k(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The k choices of the highest score plus bias (arXiv 2408.15664); the scores alone weigh them."""
        rule = self.rule
        ranked = scores.detach() if self.bias is None else scores.detach() + self.bias
        if rule["groups"] > 1:  # DeepSeek-V3, arXiv 2412.19437: groups rank by the sum of their two best
            by_group = ranked.unflatten(-1, (rule["groups"], -1))
            of_group = by_group.topk(min(2, by_group.shape[-1])).values.sum(-1)
            allowed = best(of_group, rule["groups_per_token"])
            ranked = by_group.masked_fill(~allowed[..., None], -math.inf).flatten(-2)
        chosen = best(ranked, rule["k"])
        weights = scores * chosen
        if rule["renormalise"]:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return weights * rule["scale"], chosen

    def nucleus(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest set of choices whose probabilities sum to more than p, all where they never do; the weights are
        the raw probabilities (arXiv 2403.07652)."""
        rule, choices = self.rule, probabilities.shape[-1]
        p = rule["p"] if self.p is None else self.p
        # The n largest sum to at least n/C: more than this nobody needs.
        slots = math.floor((rule["p"] if self.p is None else 1.0) * choices + 1e-6) + 1
        slots = min(slots, choices, rule["max_slots"] or choices)
        ordered, order = probabilities.detach().sort(dim=-1, descending=True, stable=True)
        used = F.pad(ordered.cumsum(-1)[..., :-1], (1, 0)) <= p
        used[..., slots:] = False
        chosen = torch.zeros_like(used).scatter(-1, order, used)
        return probabilities * chosen, chosen


def best(scores: Tensor, k: int) -> Tensor:
    """bool, of the shape of `scores`: whether a score is among the k highest of its row, the first of equal ones."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


class MoE(nn.Module):
    """y = Σ_{e chosen} w_e · expert_e(x) + w_identity · x + shared(x)."""

    def __init__(self, config: JmoeConfig, moe: dict[str, Any]):
        super().__init__()
        D = config.hidden_size
        self.router = Router(D, moe)
        self.experts = nn.ModuleList(MLP(D, width) for width in expert_widths(moe))
        self.shared_expert = MLP(D, moe["shared_d_ff"]) if moe["shared_d_ff"] else None
        self.shared_expert_gate = nn.Linear(D, 1, bias=False) if moe["shared_gate"] else None

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, RouterStats]:
        weights, chosen, stats = self.router(x, valid)
        tokens, weights, chosen = x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1)
        out = tokens.float() * weights[:, len(self.experts) :].sum(-1, keepdim=True)  # identity experts
        for e, expert in enumerate(self.experts):
            mine = chosen[:, e].nonzero()[:, 0]
            out = out.index_add(0, mine, expert(tokens[mine]).float() * weights[mine, e, None])
        out = out.view(x.shape)
        if self.shared_expert is not None:
            shared = self.shared_expert(x).float()
            if self.shared_expert_gate is not None:
                with torch.autocast(x.device.type, enabled=False):
                    shared = F.linear(x.float(), self.shared_expert_gate.weight.float()).sigmoid() * shared
            out = out + shared
        return out.to(x.dtype), stats


# ------------------------------------------------------------------------------------------------------------ the model


class Layer(GradientCheckpointingLayer):
    def __init__(self, config: JmoeConfig, index: int, feed_forward: dict[str, Any]):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = feed_forward["kind"] == "MoE"
        self.mlp = MoE(config, feed_forward) if self.is_moe else MLP(config.hidden_size, feed_forward["d_ff"])

    def forward(self, x: Tensor, place: Where, past_key_values: Cache | None) -> tuple[Tensor, RouterStats | None]:
        x = x + self.self_attn(self.input_layernorm(x), place, past_key_values)
        h, stats = self.post_attention_layernorm(x), None
        if self.is_moe:
            h, stats = self.mlp(h, place.valid)
        else:
            h = self.mlp(h)
        return x + h, stats


@dataclass
class JmoeModelOutput(ModelOutput):
    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    routers: tuple[RouterStats | None, ...] | None = None
    """statistics of each layer; None for dense layers"""


@dataclass
class JmoeOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    """float32 [B, S, V]"""
    past_key_values: Cache | None = None
    terms: dict[str, Tensor] | None = None
    """of the loss, before their coefficients"""
    routers: tuple[RouterStats | None, ...] | None = None


class JmoePreTrainedModel(PreTrainedModel):
    config_class = JmoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the trainer divides by its number of micro-batches
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["router", "shared_expert_gate"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A normal distribution truncated at three standard deviations, which leaves 0.98658 of one."""
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            std = self.config.initializer_range / 0.98658
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if getattr(module, "p", None) is not None:
            nn.init.constant_(module.p, module.rule["p"])


class JmoeModel(JmoePreTrainedModel):
    """The layers: token ids to hidden states."""

    def __init__(self, config: JmoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = enumerate(layouts(config.architecture))
        self.layers = nn.ModuleList(Layer(config, i, layout.feed_forward) for i, layout in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> JmoeModelOutput:
        """Arguments as in `JmoeForCausalLM.forward`."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, S = x.shape[:2]
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if attention_mask is None:
            attention_mask = torch.ones(B, past + S, dtype=torch.long, device=x.device)
        if attention_mask.shape != (B, past + S) or getattr(past_key_values, "is_compileable", False):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}; it must be [{B}, {past + S}]: 1 for tokens, 0 for "
                "padding, those in the cache included. Of the caches DynamicCache is supported"
            )
        if position_ids is None:  # only the distance of two tokens matters
            position_ids = torch.arange(past, past + S, device=x.device)[None]
        place = where(self.config, attention_mask.to(x.device), position_ids, past)
        routers = []
        for layer in self.layers:
            x, stats = layer(x, place, past_key_values=past_key_values)
            routers.append(stats)
        return JmoeModelOutput(self.norm(x), past_key_values, tuple(routers))


class JmoeForCausalLM(JmoePreTrainedModel, GenerationMixin):
    """The language model, with the training loss of the run it comes from."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: JmoeConfig):
        super().__init__(config)
        self.model = JmoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> JmoeOutput:
        """Logits, and the loss where `labels` are given.

        Args:
          input_ids: [B, S].
          attention_mask: [B, L]: 0 for padding, on either side; 1 for tokens or, where a row holds several documents,
            the number of the document: a token sees those of its own.
          position_ids: [B, S], ascending within a document.
          labels: [B, S]: `input_ids`, or -100 where a token is not to be predicted. They are shifted here; the first
            token of a document and padding are not predicted in any case.
          logits_to_keep: only of so many last tokens, or of these.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, return_dict=True
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        loss = terms = None
        if labels is not None:
            mask = torch.ones_like(labels) if attention_mask is None else attention_mask[:, -labels.shape[1] :]
            loss, terms = self.loss_terms(logits, labels, mask, outputs.routers)
        return JmoeOutput(loss, logits, outputs.past_key_values, terms, outputs.routers)

    def loss_terms(
        self, logits: Tensor, labels: Tensor, mask: Tensor, routers: tuple[RouterStats | None, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms before their coefficients; router terms are means over the MoE layers."""
        own = (mask[:, 1:] == mask[:, :-1]) & (mask[:, 1:] > 0)
        targets = labels[:, 1:].masked_fill(~own, -100)
        predicted = targets != -100
        num_targets = predicted.sum().clamp(min=1)
        logits = logits[:, :-1]
        terms = {
            "cross_entropy": F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_targets,
            "z_loss": (logits.logsumexp(-1).square() * predicted).sum() / num_targets,
        }
        moe_layers = [
            (stats, expert_widths(layout.feed_forward) + [0] * layout.feed_forward["identity_experts"])
            for layout, stats in zip(layouts(self.config.architecture), routers, strict=True)
            if stats is not None
        ]
        for stats, widths in moe_layers:
            for name, term in balance_terms(stats, widths).items():
                terms[name] = terms.get(name, 0.0) + term / len(moe_layers)
        coefficients = {"cross_entropy": 1.0, **self.config.loss}
        return sum(coefficients.get(name, 0.0) * term for name, term in terms.items()), terms

    @torch.no_grad()
    def update_routers(self, *outputs: JmoeOutput) -> None:
        """Moves what has no gradient, the biases that balance the load and the thresholds that hold a budget of experts
        per token: to be called once after each optimiser step, with the outputs of its forward passes."""
        layers = list(zip(layouts(self.config.architecture), self.model.layers, zip(*(o.routers for o in outputs))))  # noqa: B905
        experts_per_token: dict[tuple[int, int], list[Tensor]] = {}
        for layout, layer, calls in layers:
            if not layer.is_moe:
                continue
            router, counts = layer.mlp.router, sum(stats.tokens_per_choice for stats in calls)
            if router.bias is not None:
                moved = router.bias + router.rule["bias_rate"] * (counts.mean() - counts).sign()
                router.bias.copy_(moved - moved.mean())
            num_tokens = sum(stats.num_tokens for stats in calls).clamp(min=1)
            experts_per_token.setdefault(layout.place, []).append(counts[: router.num_experts].sum() / num_tokens)
        for layout, layer, _ in layers:
            if layer.is_moe and layer.mlp.router.p is not None:
                router = layer.mlp.router
                mean = torch.stack(experts_per_token[layout.place]).mean()
                factor = (router.rule["p_rate"] * (1 - mean / router.rule["experts_per_token"])).exp()
                router.p.copy_((router.p * factor).clamp(1e-4, 1.0))


def balance_terms(stats: RouterStats, widths: list[int]) -> dict[str, Tensor]:
    """The losses of one router, for choices of these widths."""
    num_tokens = stats.num_tokens.clamp(min=1)
    counts = stats.tokens_per_choice
    share = counts / counts.sum().clamp(min=1)
    mean_probability = stats.probability_per_choice / num_tokens
    relative = torch.tensor([w * len(widths) / sum(widths) for w in widths], device=share.device)
    return {
        "load_balance_loss": len(widths) * (share * mean_probability).sum(),
        "sequence_balance_loss": stats.sequence_balance / num_tokens,
        "router_z_loss": stats.z_squared / num_tokens,
        "dynamic_loss": stats.entropy / num_tokens,
        "parameter_penalty": len(widths) * (share * relative * mean_probability).sum(),
    }
