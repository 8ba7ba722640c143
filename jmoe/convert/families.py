"""The families: which one is which `config.Model`, and how it names its tensors.

A family is chosen by what a model is, never by what it is called. Each has a table of names, and two functions between
`config.Model` and the entries of its config.json, each the other's reverse.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jmoe import config
from jmoe.config import InputError, require
from jmoe.convert.huggingface import common, dense, dynamic_moe, mixtures, names, own
from jmoe.convert.huggingface.common import Json, NotRepresented
from jmoe.convert.mapping import Table


@dataclass(frozen=True)
class Family:
    """A class of models, of transformers or that works with it."""

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
    loss_to_json: Callable[[config.Config], Json] = common.balance_to_json
    """the entries of config.json that say how the model is trained"""
    loss_from_json: Callable[[Json, config.Model], config.Loss] = common.balance_from_json
    """the reverse"""
    always: tuple[str, ...] = ()
    """parameters that are in the files in any case: as zeros where the model lacks them"""
    files: tuple[Path, ...] = ()
    """the code of the class, which goes beside the weights"""
    module: str = "transformers"
    """where Python has the class from, in the model card; AutoModelForCausalLM finds those of transformers"""


def family_of(model: config.Model, architecture: str | None = None) -> tuple[Family, Json]:
    """The first family that represents the model exactly, or that of the class `architecture`, and the entries of its
    config.json.

    Raises NotRepresented with what is in the way.
    """
    reasons = []
    for family in FAMILIES if architecture is None else [f for f in KNOWN if f.architecture == architecture]:
        try:
            return family, family.to_json(model)
        except NotRepresented as reason:
            reasons.append(str(reason))
    known = ", ".join(family.architecture for family in KNOWN)
    raise NotRepresented("; ".join(reasons) or f"it is unknown, and must be one of {known}")


_WINDOWLESS = {"use_sliding_window": False}
FAMILIES = (
    Family(
        *("llama", "LlamaForCausalLM", names.LLAMA),
        dense.to_json_of(None, False, {"mlp_bias": False}),
        dense.from_json_of(common.window_never, qk_norm=False),
    ),
    Family(
        *("mistral", "MistralForCausalLM", names.LLAMA),
        dense.to_json_of(None, False, {"sliding_window": None}),
        dense.from_json_of(common.window_if_given, qk_norm=False),
    ),
    Family(
        *("qwen2", "Qwen2ForCausalLM", names.LLAMA),
        dense.to_json_of(None, True, _WINDOWLESS),
        dense.from_json_of(common.window_if_used, qk_norm=False, qkv_bias=True),
    ),
    Family(
        *("qwen3", "Qwen3ForCausalLM", names.LLAMA),
        dense.to_json_of("head", False, _WINDOWLESS),
        dense.from_json_of(common.window_if_used, qk_norm=True),
    ),
    Family("mixtral", "MixtralForCausalLM", names.MIXTRAL, mixtures.mixtral_to_json, mixtures.mixtral_from_json),
    Family(
        "qwen2_moe", "Qwen2MoeForCausalLM", names.QWEN_MOE, mixtures.qwen2_moe_to_json, mixtures.qwen2_moe_from_json
    ),
    Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", names.QWEN_MOE, mixtures.qwen3_moe_to_json, mixtures.qwen3_moe_from_json
    ),
    Family("olmoe", "OlmoeForCausalLM", names.QWEN_MOE, mixtures.olmoe_to_json, mixtures.olmoe_from_json),
    Family(
        "dots1",
        "Dots1ForCausalLM",
        names.DEEPSEEK,
        mixtures.dots1_to_json,
        mixtures.dots1_from_json,
        always=("feed_forward/router/bias",),
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        names.DEEPSEEK,
        mixtures.glm4_moe_to_json,
        mixtures.glm4_moe_from_json,
        always=("feed_forward/router/bias",),
    ),
    Family(
        *("jmoe", "JmoeForCausalLM", names.OWN, own.to_json, own.from_json, own.loss_to_json, own.loss_from_json),
        files=(own.MODELLING_FILE,),
    ),
)
# And those that have to be asked for, since it takes more than transformers to read them.
KNOWN = (
    *FAMILIES,
    Family(
        *("llama", "MoEForCausalLM", names.DYNAMIC_MOE, dynamic_moe.to_json, dynamic_moe.from_json),
        *(dynamic_moe.loss_to_json, dynamic_moe.loss_from_json),
        module="modeling.modeling_moe",
    ),
)


def family_named(json: Json) -> Family:
    """The family that a config.json says it is of. Raises InputError if jmoe does not know it."""
    kind, classes = json.get("model_type"), json.get("architectures") or []
    for family in KNOWN:
        if classes == [family.architecture] and kind in (family.model_type, None):
            return family
    for family in FAMILIES:
        if family.model_type == kind:
            require(not classes, f"config.json: architectures = {classes} is not supported; {family.architecture} is")
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise InputError(f"config.json: model_type = {kind!r} is not supported; it must be one of {known}")
