"""The configuration of a run: frozen dataclasses whose rules stand in `__post_init__`.

Each field's docstring gives its meaning and its unit in brackets; `python train.py --help` prints them. A value that
cannot be raises `InputError`, whose message is one line naming the numbers. `jmoe.recipe` loads a recipe, applies flags
and reads and writes the JSON form.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal


class InputError(ValueError):
    """Bad input from the user, told in one line."""


def require(condition: bool, message: str) -> None:
    """Raises `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class TopK:
    """Every token goes to its k experts of the highest score, which weighs their outputs.

    Mixtral is the default: its softmax over the k chosen logits is the softmax over all of them, renormalised. OLMoE
    is `renormalise=False`, DeepSeek-V3 `score="sigmoid"` with a scale, groups and `bias_rate`.
    """

    k: int = 2
    """experts per token [count]"""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """of an expert from its logit: over all experts, or each by itself [name]"""
    renormalise: bool = True
    """the scores of a token's experts are divided by their sum [switch]"""
    scale: float = 1.0
    """times the combine weights: DeepSeek-V3's routed scaling factor [unitless]"""
    groups: int = 1
    """groups of neighbouring experts; a token chooses within its best ones (DeepSeek-V3) [count]"""
    groups_per_token: int = 1
    """groups a token chooses within, ranked by the sum of their two highest scores [count]"""
    bias_rate: float = 0.0
    """step of the bias that balances the load (arXiv 2408.15664), added to scores for the choice alone; DeepSeek-V3
    has 1e-3; 0 for no bias [score per optimiser step]"""

    def __post_init__(self):
        require(self.k >= 1, f"router.k is {self.k}; it must be at least 1")
        require(self.scale > 0, f"router.scale is {self.scale}; it must be positive")
        require(self.bias_rate >= 0, f"router.bias_rate is {self.bias_rate}; it must not be negative")
        require(self.groups >= 1, f"router.groups is {self.groups}; it must be at least 1")
        require(
            1 <= self.groups_per_token <= self.groups,
            f"router.groups_per_token is {self.groups_per_token}; it must be between 1 and groups = {self.groups}",
        )

    def slots(self, num_choices: int) -> int:
        """K, the static number of slots per token, of `num_choices` experts to choose from."""
        require(
            num_choices % self.groups == 0,
            f"router.groups = {self.groups} does not divide the {num_choices} experts to choose from",
        )
        reachable = num_choices // self.groups * self.groups_per_token
        where = "" if self.groups == 1 else f" in {self.groups_per_token} of {self.groups} groups"
        require(self.k <= reachable, f"router.k is {self.k}; it must be between 1 and num_experts = {reachable}{where}")
        return self.k


@dataclass(frozen=True)
class Nucleus:
    """Every token goes to the smallest set of experts whose probabilities sum to more than p (arXiv 2403.07652)."""

    p: float = 0.4
    """threshold on the summed router probability; where it starts if `experts_per_token` is given [probability,
    0 < p <= 1]"""
    max_slots: int | None = None
    """most experts a token gets: the least probable beyond are dropped, and counted; None for as many as p can ask for,
    so that nothing is dropped [count]"""
    experts_per_token: float | None = None
    """budget: p moves so that tokens get this many experts, as a mean over the batch and the repeats of the layer; None
    for a fixed p [count]"""
    p_rate: float = 0.05
    """how fast p moves: share of the deviation undone in a step while probabilities are uniform [per step]"""

    def __post_init__(self):
        require(0.0 < self.p <= 1.0, f"router.p is {self.p}; a probability threshold must lie in (0, 1]")
        require(
            self.max_slots is None or self.max_slots >= 1, f"router.max_slots is {self.max_slots}; it must be positive"
        )
        require(0.0 < self.p_rate <= 1.0, f"router.p_rate is {self.p_rate}; it must lie in (0, 1]")

    def bound(self, num_choices: int) -> int:
        """The most experts a token can ask for: the n largest of E probabilities sum to at least n/E, so ⌊pE⌋+1 always
        suffice; all where p moves. The small term keeps 0.29 * 100 = 28.999... from losing a slot."""
        p = self.p if self.experts_per_token is None else 1.0
        return min(num_choices, math.floor(p * num_choices + 1e-6) + 1)

    def slots(self, num_choices: int) -> int:
        """K, the static number of slots per token, of `num_choices` experts to choose from."""
        slots = min(self.bound(num_choices), self.max_slots or num_choices)
        budget = self.experts_per_token
        require(
            budget is None or 1.0 <= budget <= slots,
            f"router.experts_per_token is {budget}; it must lie between 1 and the {slots} slots of a token",
        )
        return slots


Router = TopK | Nucleus


@dataclass(frozen=True)
class Dense:
    """A dense SwiGLU feed-forward layer."""

    d_ff: int = 512
    """hidden width [features]"""

    def __post_init__(self):
        require(self.d_ff >= 1, f"Dense.d_ff is {self.d_ff}; it must be at least 1")


# Hidden widths of 8 experts relative to one another (arXiv 2408.10681).
RELATIVE_WIDTHS = {
    "equal": (1, 1, 1, 1, 1, 1, 1, 1),
    "arithmetic": (9, 11, 13, 15, 17, 19, 21, 23),
    "geometric": (1, 2, 4, 8, 16, 32, 64, 128),
    "hybrid": (1, 1, 1, 1, 2, 2, 4, 4),
}


@dataclass(frozen=True)
class MoE:
    """A mixture of SwiGLU experts, of equal or different widths."""

    num_experts: int = 16
    """routed experts in the layer [count]"""
    d_ff: int | tuple[int, ...] = 128
    """hidden width of each expert: one for all (the mean, if `widths` are not equal), or a list from narrow to wide
    [features]"""
    router: Router = Nucleus()
    """how tokens choose experts"""
    widths: Literal["equal", "arithmetic", "geometric", "hybrid"] = "equal"
    """how the widths differ at the same total, in the proportions of HMoE (arXiv 2408.10681) [name]"""
    identity_experts: int = 0
    """further choices of the router that return the token itself and cost nothing (MoE++, LongCat) [count]"""
    shared_d_ff: int = 0
    """hidden width of the shared expert, which every token passes besides; 0 for none [features]"""
    shared_gate: bool = False
    """the shared expert is weighed by the sigmoid of a linear map of the token (Qwen2-MoE) [switch]"""

    def __post_init__(self):
        require(self.num_experts >= 1, f"MoE.num_experts is {self.num_experts}; it must be at least 1")
        for name in ("identity_experts", "shared_d_ff"):
            value = getattr(self, name)
            require(value >= 0, f"MoE.{name} is {value}; it must not be negative")
        require(self.shared_d_ff > 0 or not self.shared_gate, "MoE.shared_gate needs a shared expert: set shared_d_ff")
        if isinstance(self.d_ff, int):
            require(self.d_ff >= 1, f"MoE.d_ff is {self.d_ff}; it must be at least 1")
            require(
                self.widths == "equal" or self.num_experts % 8 == 0,
                f"MoE.widths = {self.widths} is for a multiple of 8 experts, not {self.num_experts}; list them as d_ff",
            )
        else:
            require(
                len(self.d_ff) == self.num_experts,
                f"MoE.d_ff lists {len(self.d_ff)} widths; it must be one for each of num_experts = {self.num_experts}",
            )
            require(self.widths == "equal", f"MoE.widths = {self.widths} needs the mean width as d_ff, not a list")
            require(list(self.d_ff) == sorted(self.d_ff), f"MoE.d_ff = {self.d_ff} must run from narrow to wide")
        require(
            min(self.expert_widths) >= 1,
            f"MoE.d_ff = {self.d_ff} leaves an expert of width {min(self.expert_widths)}; it must be at least 1",
        )
        self.router.slots(self.num_choices)

    @property
    def num_choices(self) -> int:
        """What the router chooses from: routed experts, then identity experts."""
        return self.num_experts + self.identity_experts

    @property
    def slots(self) -> int:
        """K, the static number of slots per token."""
        return self.router.slots(self.num_choices)

    @property
    def expert_widths(self) -> tuple[int, ...]:
        """Hidden width of each routed expert, from narrow to wide. Proportions are rounded so that the total holds."""
        if not isinstance(self.d_ff, int):
            return self.d_ff
        if self.widths == "equal":
            return (self.d_ff,) * self.num_experts
        relative, total = RELATIVE_WIDTHS[self.widths], 8 * self.d_ff
        ends = [total * sum(relative[: e + 1]) // sum(relative) for e in range(8)]
        widths = sorted(end - start for start, end in zip([0, *ends], ends, strict=False))
        return tuple(width for width in widths for _ in range(self.num_experts // 8))


FeedForward = Dense | MoE


@dataclass(frozen=True)
class LayerGroup:
    """`pattern` repeated `repeats` times: the pattern is unrolled, the repeats run under one `lax.scan`."""

    pattern: tuple[FeedForward, ...] = (MoE(),)
    """the feed-forward of each layer of the pattern, in order"""
    repeats: int = 1
    """how often the pattern repeats [count]"""

    def __post_init__(self):
        require(len(self.pattern) >= 1, "LayerGroup.pattern is empty; it needs at least one layer")
        require(self.repeats >= 1, f"LayerGroup.repeats is {self.repeats}; it must be at least 1")


@dataclass(frozen=True)
class Model:
    """A decoder-only Transformer: RMSNorm, rotary positions, grouped-query attention, dense or MoE feed-forward."""

    vocab_size: int = 257
    """rows of the embedding table; every token id is smaller [tokens]"""
    d_model: int = 128
    """width of the residual stream [features]"""
    num_heads: int = 4
    """query heads [count]"""
    num_kv_heads: int = 2
    """key and value heads; divides num_heads [count]"""
    head_dim: int = 32
    """width of one head; even, for rotary positions [features]"""
    qk_norm: bool = True
    """RMSNorm on queries and keys [switch]"""
    qk_norm_over: Literal["head", "projection"] = "head"
    """what its mean square runs over: each head by itself, or all of them (OLMoE) [name]"""
    qkv_bias: bool = False
    """queries, keys and values have a bias (Qwen2) [switch]"""
    rope_base: float = 10000.0
    """base of the rotary frequencies [unitless]"""
    norm_eps: float = 1e-6
    """added to the mean square in RMSNorm [unitless]"""
    tie_embeddings: bool = True
    """the output head shares the embedding table [switch]"""
    init_std: float = 0.02
    """standard deviation of initial weights, truncated normal [unitless]"""
    layers: tuple[LayerGroup, ...] = (LayerGroup(),)
    """the layers, in order"""

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "num_heads", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name} is {value}; it must be at least 1")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads = {self.num_heads} is not divisible by model.num_kv_heads = {self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"model.head_dim is {self.head_dim}; rotary positions need an even number")
        require(self.rope_base > 1.0, f"model.rope_base is {self.rope_base}; it must be greater than 1")
        require(self.norm_eps > 0.0, f"model.norm_eps is {self.norm_eps}; it must be positive")
        require(self.init_std > 0.0, f"model.init_std is {self.init_std}; it must be positive")
        require(len(self.layers) >= 1, "model.layers is empty; it needs at least one layer group")

    @property
    def num_layers(self) -> int:
        """Transformer layers in all."""
        return sum(len(group.pattern) * group.repeats for group in self.layers)


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Embedded:
    """The embedded corpus: the source text of the running Python's standard library."""

    weight: float = 1.0
    """share of the training rows, relative to the other sources [unitless]"""


@dataclass(frozen=True)
class Files:
    """Local files: .txt is one document a file, .jsonl one a line; each also .gz or .zst."""

    glob: str = ""
    """pattern of the files, `**` reaches into folders [path]"""
    text_key: str = "text"
    """the field of a .jsonl line that holds the text [name]"""
    weight: float = 1.0
    """share of the training rows, relative to the other sources [unitless]"""


@dataclass(frozen=True)
class TFDS:
    """A TensorFlow Dataset stored as array_record, read without TensorFlow."""

    name: str = ""
    """name/config:version as TFDS spells it, or the directory of one prepared version [name or path]"""
    split: str = "train"
    """TFDS split, slices allowed: train[:90%] [name]"""
    data_dir: str | None = None
    """where the dataset lies; TFDS's own default if None [path]"""
    text_key: str = "text"
    """the feature that holds the text [name]"""
    weight: float = 1.0
    """share of the training rows, relative to the other sources [unitless]"""


Source = Embedded | Files | TFDS


@dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes: ids 0-255, then the special token `<|endoftext|>`."""


@dataclass(frozen=True)
class BPE:
    """A byte-level BPE trained on the training documents of the run's own sources, once, and kept in the cache."""

    vocab_size: int = 4096
    """ids in all, special tokens included [tokens]"""
    train_megabytes: float = 16.0
    """how much text the merges are learnt from, spread over the documents [10^6 bytes]"""

    def __post_init__(self):
        require(
            self.vocab_size >= 257,
            f"BPE.vocab_size is {self.vocab_size}; 256 bytes and one special token are the least",
        )
        require(self.train_megabytes > 0, f"BPE.train_megabytes is {self.train_megabytes}; it must be positive")


@dataclass(frozen=True)
class TokenizerFile:
    """Any Hugging Face `tokenizer.json`."""

    path: str = ""
    """the file [path]"""
    eos: str | None = None
    """the token that stands before and after each document; looked for among the usual names if None [token]"""


Tokenizer = Bytes | BPE | TokenizerFile


@dataclass(frozen=True)
class Data:
    """Where the text comes from and how it becomes rows of tokens."""

    sources: tuple[Source, ...] = (Embedded(),)
    """training text, mixed by weight"""
    validation: tuple[Source, ...] = ()
    """validation text; if empty, `validation_fraction` of the documents of `sources` is held out"""
    validation_fraction: float = 0.02
    """share of the documents held out, chosen by a hash of the document's name [fraction]"""
    tokenizer: Tokenizer = Bytes()
    """how text becomes token ids"""
    seq_len: int = 256
    """tokens a row: a training sequence [tokens]"""
    cache_dir: str | None = None
    """where tokenised data is kept; ~/.cache/jmoe (or $JMOE_CACHE) if None [path]"""
    workers: int = 1
    """reading threads; the batches are the same for any number [threads]"""

    def __post_init__(self):
        require(len(self.sources) >= 1, "data.sources is empty; name at least one source")
        for name in ("sources", "validation"):
            for source in getattr(self, name):
                require(source.weight > 0, f"data.{name}: weight of {source} is {source.weight}; it must be positive")
        require(
            0.0 <= self.validation_fraction < 1.0 and (self.validation_fraction > 0 or bool(self.validation)),
            f"data.validation_fraction is {self.validation_fraction}; it must lie in (0, 1), or give data.validation",
        )
        require(self.seq_len >= 2, f"data.seq_len is {self.seq_len}; it must be at least 2")
        require(self.workers >= 1, f"data.workers is {self.workers}; it must be at least 1")


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to `final` times the peak."""

    warmup_steps: int = 20
    """steps of linear warm-up [steps]"""
    final: float = 0.1
    """last learning rate over peak learning rate [ratio]"""

    def __post_init__(self):
        require(0.0 <= self.final <= 1.0, f"optim.schedule.final is {self.final}; it must lie in [0, 1]")


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay (arXiv 2404.06395, 2405.18392): constant until the last `decay_fraction` of the steps."""

    warmup_steps: int = 20
    """steps of linear warm-up [steps]"""
    decay_fraction: float = 0.1
    """share of all steps spent decaying, at the end [fraction]"""
    decay_start: int | None = None
    """steps taken when the decay begins, in place of `decay_fraction`; `--decay-from` sets it [steps]"""
    shape: Literal["linear", "1-sqrt", "exponential"] = "1-sqrt"
    """course of the decay; an exponential one needs a `final` above 0 [name]"""
    final: float = 0.0
    """last learning rate over peak learning rate [ratio]"""

    def __post_init__(self):
        require(
            self.decay_start is None or self.decay_start >= 0,
            f"optim.schedule.decay_start is {self.decay_start}; it must not be negative",
        )
        require(
            0.0 <= self.decay_fraction <= 1.0,
            f"optim.schedule.decay_fraction is {self.decay_fraction}; it must lie in [0, 1]",
        )
        require(0.0 <= self.final <= 1.0, f"optim.schedule.final is {self.final}; it must lie in [0, 1]")
        require(
            self.shape != "exponential" or self.final > 0.0,
            "optim.schedule.final is 0, which an exponential decay never reaches; give the last learning rate over the "
            "peak, such as 0.1",
        )

    def decay_begins(self, steps: int) -> int:
        """Steps taken when the decay begins, of a run of `steps`; not before the end of the warm-up."""
        start = steps - max(1, round(self.decay_fraction * steps)) if self.decay_start is None else self.decay_start
        return min(max(start, self.warmup_steps), steps)


@dataclass(frozen=True)
class Constant:
    """Linear warm-up, then constant."""

    warmup_steps: int = 20
    """steps of linear warm-up [steps]"""


Schedule = Cosine | WSD | Constant


Role = Literal["embedding", "head", "norm", "router", "attention", "feed_forward", "experts"]


@dataclass(frozen=True)
class ByRole:
    """A factor for the parameters of each role; `jmoe.optim.roles` tells which have which."""

    embedding: float = 1.0
    """of the token embedding, which is the head too where they are tied [ratio]"""
    head: float = 1.0
    """of the output head [ratio]"""
    norm: float = 1.0
    """of the norms' gains, and of biases [ratio]"""
    router: float = 1.0
    """of the routers and the shared experts' gates [ratio]"""
    attention: float = 1.0
    """of the query, key, value and output projections [ratio]"""
    feed_forward: float = 1.0
    """of dense feed-forward layers and shared experts [ratio]"""
    experts: float = 1.0
    """of routed experts [ratio]"""

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            require(value >= 0, f"the factor of role {name} is {value}; it must not be negative")


@dataclass(frozen=True)
class Optimiser:
    """What all optimisers have: AdamW takes b1, b2 and eps, and so do the parameters that another rule leaves to it."""

    learning_rate: float = 3e-3
    """peak learning rate [per step]"""
    schedule: Schedule = Cosine()
    """course of the learning rate over the run"""
    b1: float = 0.9
    """AdamW: decay of the gradient's running mean [per step]"""
    b2: float = 0.95
    """AdamW: decay of the squared gradient's running mean [per step]"""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment [unitless]"""
    weight_decay: float = 0.1
    """share of a parameter taken off, times the learning rate [per step]"""
    clip_norm: float = 1.0
    """largest global norm of the gradient; larger gradients are scaled down to it [unitless]"""
    learning_rates: ByRole = ByRole()
    """times the learning rate, weight decay included"""
    decays: ByRole = ByRole()
    """times the weight decay"""

    def __post_init__(self):
        require(self.learning_rate > 0, f"optim.learning_rate is {self.learning_rate}; it must be positive")
        for name in ("b1", "b2"):
            check_decay(f"optim.{name}", getattr(self, name))
        require(self.eps > 0, f"optim.eps is {self.eps}; it must be positive")
        require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}; it must not be negative")
        require(self.clip_norm > 0, f"optim.clip_norm is {self.clip_norm}; it must be positive")
        require(
            self.schedule.warmup_steps >= 0,
            f"optim.schedule.warmup_steps is {self.schedule.warmup_steps}; it must not be negative",
        )


def check_decay(name: str, value: float) -> None:
    """Raises `InputError` unless `value` can be the decay of a running mean."""
    require(0.0 <= value < 1.0, f"{name} is {value}; it must lie in [0, 1)")


@dataclass(frozen=True)
class AdamW(Optimiser):
    """AdamW with decoupled weight decay (arXiv 1711.05101); norm gains are not decayed."""

    decays: ByRole = ByRole(norm=0.0)
    """times the weight decay"""


@dataclass(frozen=True)
class Muon(Optimiser):
    """Muon for matrices, each layer's and each expert's on its own, in Moonlight's form (arXiv 2502.16982), at AdamW's
    learning rate; AdamW for the rest."""

    momentum: float = 0.95
    """decay of the gradients' sum, in Nesterov's form [per step]"""
    iterations: int = 5
    """steps of the Newton-Schulz iteration [count]"""
    coefficients: Literal["standard", "polar-express"] = "standard"
    """of the iteration: Keller Jordan's, the same for all steps, or those of arXiv 2505.16932 [name]"""
    rms: float = 0.2
    """root mean square of a matrix's update, times the learning rate: 0.2 is what AdamW's is like [unitless]"""
    matrices: tuple[Literal["router", "attention", "feed_forward", "experts"], ...] = (
        *("router", "attention", "feed_forward", "experts"),
    )
    """roles whose matrices are orthogonalised; the others follow AdamW [names]"""
    heads: Literal["together", "apart"] = "together"
    """whether an attention projection is one matrix or one for each head [name]"""
    iteration_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """of the iteration, and of what devices send for it; products are summed in float32 [dtype]"""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """what the momentum is kept in between steps [dtype]"""

    def __post_init__(self):
        super().__post_init__()
        check_decay("optim.momentum", self.momentum)
        require(self.iterations >= 1, f"optim.iterations is {self.iterations}; it must be at least 1")
        require(self.rms > 0, f"optim.rms is {self.rms}; it must be positive")


@dataclass(frozen=True)
class NorMuon(Muon):
    """Muon whose update is divided by its root mean square over time, output by output (arXiv 2510.05491)."""

    output_decay: float = 0.95
    """decay of the running mean square of each output's update [per step]"""

    def __post_init__(self):
        super().__post_init__()
        check_decay("optim.output_decay", self.output_decay)


AnyOptimiser = AdamW | Muon | NorMuon


@dataclass(frozen=True)
class Loss:
    """Coefficients of the training loss; each term is also a metric under its own name."""

    z_loss: float = 1e-4
    """squared log-partition of the vocabulary softmax, mean over tokens [coefficient]"""
    load_balance_loss: float = 1e-2
    """E * sum(share of assignments * mean probability) over the global batch, mean over MoE layers [coefficient]"""
    sequence_balance_loss: float = 0.0
    """the same within each sequence, mean over tokens and MoE layers (DeepSeek-V3) [coefficient]"""
    router_z_loss: float = 0.0
    """squared log-partition of the router's logits, mean over tokens and MoE layers (ST-MoE) [coefficient]"""
    dynamic_loss: float = 1e-4
    """entropy of the router's probabilities, mean over tokens and MoE layers (arXiv 2403.07652) [coefficient]"""
    parameter_penalty: float = 0.0
    """load_balance_loss with each expert's share times its width over the mean width (arXiv 2408.10681)
    [coefficient]"""
    chunk_tokens: int = 4096
    """logits are held for this many tokens at a time, on each device [tokens]"""

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            require(value >= 0, f"loss.{name} is {value}; it must not be negative")
        require(self.chunk_tokens >= 1, f"loss.chunk_tokens is {self.chunk_tokens}; it must be at least 1")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh; -1 takes the devices that are left."""

    data: int = 1
    """devices along which only the batch is split [devices]"""
    fsdp: int = 1
    """devices along which the batch and the parameters are split [devices]"""
    expert: int = 1
    """devices along which the batch and the experts are split; other parameters as by fsdp [devices]"""
    tensor: int = 1
    """devices along which heads, hidden features and the vocabulary are split [devices]"""

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name} is {size}; it must be positive, or -1 for the devices left")
        require(list(sizes.values()).count(-1) <= 1, f"mesh {sizes}: only one axis can be -1")


@dataclass(frozen=True)
class Automatic:
    """RaggedAllToAll where the platform has it (TPU, GPU), else AllToAll."""

    capacity: float | None = None
    """as in AllToAll [ratio]"""

    def __post_init__(self):
        _check_capacity(self.capacity)


@dataclass(frozen=True)
class AllGather:
    """Every device gets the tokens of all devices along mesh.expert, and adds its experts' share of their outputs."""


@dataclass(frozen=True)
class AllToAll:
    """Each token is sent to the devices of its experts and its outputs come back, in messages of one size."""

    capacity: float | None = None
    """the most rows a device takes, over its share of all slots, those unused included; what is too much is dropped,
    a token's lowest choices and the last tokens first, and counted. None to drop nothing: what is more than 1.25 times
    the share takes further rounds [ratio]"""

    def __post_init__(self):
        _check_capacity(self.capacity)


@dataclass(frozen=True)
class RaggedAllToAll:
    """The same in messages of the size that is needed; for TPU and GPU."""

    capacity: float | None = None
    """as in AllToAll [ratio]"""

    def __post_init__(self):
        _check_capacity(self.capacity)


def _check_capacity(capacity: float | None) -> None:
    require(capacity is None or capacity > 0, f"transport.capacity is {capacity}; it must be positive, or None")


Transport = Automatic | AllGather | AllToAll | RaggedAllToAll


@dataclass(frozen=True)
class Checkpoint:
    """When the state is saved and how many saves are kept."""

    every: int = 100
    """a save every so many steps, and at the end [steps]"""
    keep: int = 2
    """the newest saves kept [count]"""
    keep_every: int | None = None
    """saves at multiples of this are kept for good [steps]"""

    def __post_init__(self):
        require(self.every >= 1, f"checkpoint.every is {self.every}; it must be at least 1")
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}; it must be at least 1")
        require(
            self.keep_every is None or self.keep_every >= 1,
            f"checkpoint.keep_every is {self.keep_every}; it must be at least 1",
        )


@dataclass(frozen=True)
class Evaluation:
    """Validation during and after training."""

    every: int = 100
    """a validation every so many steps, and at the end [steps]"""
    batches: int = 8
    """most batches of a validation during training [batches]"""
    final_batches: int | None = None
    """most batches of the validation at the end; the whole text if None [batches]"""

    def __post_init__(self):
        require(self.every >= 1, f"evaluation.every is {self.every}; it must be at least 1")
        require(self.batches >= 1, f"evaluation.batches is {self.batches}; it must be at least 1")
        require(
            self.final_batches is None or self.final_batches >= 1,
            f"evaluation.final_batches is {self.final_batches}; it must be at least 1",
        )


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    model: Model = field(default_factory=Model)
    """the architecture"""
    data: Data = field(default_factory=Data)
    """the text"""
    optim: AnyOptimiser = field(default_factory=AdamW)
    """the optimiser"""
    loss: Loss = field(default_factory=Loss)
    """the training loss"""
    mesh: Mesh = field(default_factory=Mesh)
    """the devices"""
    transport: Transport = Automatic()
    """how tokens reach experts on other devices, along mesh.expert"""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """saving"""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """validation"""
    steps: int = 300
    """optimiser steps in all [steps]"""
    batch_size: int = 16
    """sequences a step, over all devices and micro-batches [sequences]"""
    accumulation: int = 1
    """micro-batches a step, one after another [count]"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """arithmetic of the layers; parameters and losses are float32 [dtype]"""
    remat: Literal["none", "dots", "full"] = "none"
    """what the backward pass recomputes: nothing, all but matrix products, whole layers [name]"""
    qk_clip: float | None = None
    """attention heads with a logit above this are scaled down to it after each step (QK-Clip, arXiv 2507.20534; Kimi K2
    has 100); None for no clip [logit]"""
    seed: int = 0
    """of the initial weights, the data order and sampling [unitless]"""
    ema: float | None = None
    """keep an exponential moving average of the parameters with this decay, for `eval.py --ema`; it takes their memory
    once more; None for none [per step]"""
    max_skipped: int = 10
    """training stops after this many steps in a row with gradients that are not finite [steps]"""
    log_every: int = 10
    """a line of metrics every so many steps [steps]"""
    run_dir: str | None = None
    """where the run lives, also gs://BUCKET/PATH; runs/NAME of the recipe if None [path]"""
    decay_from: str | None = None
    """RUN@STEP: begin with that checkpoint of a run in its stable phase, and decay the learning rate from there to the
    end [path@steps]"""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "max_skipped", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be at least 1")
        require(self.seed >= 0, f"seed is {self.seed}; it must not be negative")
        require(
            self.batch_size % self.accumulation == 0,
            f"batch_size = {self.batch_size} is not divisible by accumulation = {self.accumulation}",
        )
        require(self.qk_clip is None or self.qk_clip > 0, f"qk_clip is {self.qk_clip}; it must be positive, or None")
        require(
            self.qk_clip is None or not self.model.qk_norm,
            f"qk_clip = {self.qk_clip} scales projections that model.qk_norm normalises again; turn one of them off",
        )
        require(self.ema is None or 0.0 < self.ema < 1.0, f"ema is {self.ema}; it must lie in (0, 1), or be None")
        run, _, step = ("run@0" if self.decay_from is None else self.decay_from).rpartition("@")
        require(
            bool(run) and step.isdecimal(),
            f"decay_from is {self.decay_from!r}; it must be RUN@STEP, a run directory and the step of a checkpoint",
        )
        warmup = self.optim.schedule.warmup_steps
        require(warmup <= self.steps, f"optim.schedule.warmup_steps = {warmup} is more than steps = {self.steps}")
