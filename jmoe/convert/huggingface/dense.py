"""The dense families: config.json ↔ `config.Model`."""

from collections.abc import Callable
from typing import Any

from jmoe import config
from jmoe.convert.huggingface.common import (
    Json,
    common_from_json,
    common_to_json,
    dense_width,
    get,
    norm_and_bias,
    refuse_bias,
    refuse_windows,
    unless,
)
from jmoe.flops import feed_forwards


def to_json_of(norm: str | None, bias: bool, extra: Json) -> Callable[[config.Model], Json]:
    def to_json(model: config.Model) -> Json:
        layers = feed_forwards(model)
        unless(all(isinstance(each, config.Dense) for each in layers), "MoE layers")
        norm_and_bias(model, norm=norm, bias=bias)
        unless(norm is not None or bias or model.d_model % model.num_heads == 0, "d_model not a multiple of num_heads")
        return {**common_to_json(model), "intermediate_size": dense_width(model, layers), **extra}

    return to_json


def from_json_of(windows: Callable[[Json], bool], **fields: Any) -> Callable[[Json], config.Model]:
    def from_json(json: Json) -> config.Model:
        refuse_bias(json)
        refuse_windows(json, windows(json))
        layer = config.Dense(get(json, "intermediate_size", int))
        head_dim = {"head_dim": 128} if "head_dim" not in json and fields.get("qk_norm") else {}
        return common_from_json(json | head_dim, [layer] * get(json, "num_hidden_layers", int), **fields)

    return from_json
