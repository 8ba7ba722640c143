"""What config.json leaves out, or says in a way that few models do."""

from typing import Any

import pytest

from jmoe.config import Dense, InputError, MoE
from jmoe.convert.families import family_named
from jmoe.flops import feed_forwards

SHAPE = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 4}
SHAPE |= {"num_hidden_layers": 4, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def read(model_type: str, **entries: Any):
    return family_named({"model_type": model_type}).from_json({**SHAPE, **entries})


def kinds(model_type: str, **entries: Any):
    return [type(each) for each in feed_forwards(read(model_type, **entries))]


def test_heads_are_as_wide_as_the_family_has_them():
    assert (read("qwen3").head_dim, read("qwen2").head_dim, read("qwen3", head_dim=8).head_dim) == (128, 4, 8)


def test_which_layers_have_experts():
    assert kinds("qwen2_moe") == [MoE] * 4
    assert kinds("qwen2_moe", decoder_sparse_step=2) == [Dense, MoE, Dense, MoE]
    assert kinds("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3]) == [Dense, MoE, Dense, Dense]
    assert kinds("dots1") == [MoE] * 4
    assert kinds("glm4_moe", partial_rotary_factor=1.0) == [Dense, MoE, MoE, MoE]
    assert kinds("dots1", first_k_dense_replace=2) == [Dense, Dense, MoE, MoE]


WINDOW = "sliding_window = 8 is not supported"


@pytest.mark.parametrize(
    ("model_type", "entries", "told"),
    [
        ("qwen2", {"sliding_window": 8}, None),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, WINDOW),
        ("qwen2", {"sliding_window": 8, "layer_types": ["full_attention"] * 4}, None),
        ("qwen2", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2}, WINDOW),
        ("dots1", {"sliding_window": 8, "max_window_layers": 4}, None),
        ("dots1", {"sliding_window": 8, "max_window_layers": 3}, WINDOW),
        ("glm4_moe", {}, "partial_rotary_factor = 0.5 is not supported"),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1.0}}, None),
    ],
)
def test_what_is_in_use_is_refused(model_type, entries, told):
    if told is None:
        read(model_type, **entries)
    else:
        with pytest.raises(InputError, match=told):
            read(model_type, **entries)
