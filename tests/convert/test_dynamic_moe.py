"""The layout of the nucleus paper's own code."""

import json

import numpy as np
import pytest

from jmoe.config import Config, Data, Dense, InputError, LayerGroup, Model, MoE, Nucleus, TopK
from jmoe.convert.exporting import Options, export
from jmoe.convert.huggingface import dynamic_moe
from jmoe.convert.huggingface.common import NotRepresented
from jmoe.convert.importing import import_
from jmoe.convert.mapping import parameter_shapes
from jmoe.convert.runs import Run, write_run
from jmoe.convert.shards import Reader
from jmoe.convert.verify import verify
from jmoe.data.tokenizer import byte_tokenizer

SPARSE, PLAIN = MoE(4, 24, Nucleus(0.4)), Dense(24)
SHAPE = {"vocab_size": 260, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "qk_norm": False}


def model(*layers: LayerGroup, **fields) -> Model:
    return Model(**SHAPE | {"tie_embeddings": False, "layers": layers} | fields)


def test_there_and_back_bit_for_bit(tmp_path):
    settings = Config(model=model(LayerGroup((SPARSE, PLAIN), 2), LayerGroup((SPARSE,))), data=Data(seq_len=32))
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape) for name, shape in parameter_shapes(settings.model).items()}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    write_run(tmp_path / "run", settings, byte_tokenizer(), lambda writer: writer.write_all(values.__getitem__))
    export(tmp_path / "run", tmp_path / "hf", Options(family="MoEForCausalLM"))
    entries = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert entries["architectures"] == ["MoEForCausalLM"] and entries["model_type"] == "llama"
    assert (entries["expert_frequency"], entries["top_p_threshold"], entries["num_experts"]) == (2, 0.4, 4)
    assert "from modeling.modeling_moe import MoEForCausalLM" in (tmp_path / "hf" / "README.md").read_text()

    reader = Reader(tmp_path / "hf")
    per_layer = ("input_norm", "post_attention_norm", *(f"self_attn.{part}_proj" for part in "qkvo"))
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(5):
        places = ["mlp"] if layer % 2 else [f"experts.{e}" for e in range(4)]
        mlp = [f"mlp.{place}.{part}_proj" for place in places for part in ("gate", "up", "down")]
        names = [*per_layer, *mlp, *([] if layer % 2 else ["mlp.router"])]
        expected |= {f"model.layers.{layer}.{name}.weight" for name in names}
    assert reader.tensors.keys() == expected
    np.testing.assert_array_equal(
        reader.read("model.layers.2.mlp.experts.3.up_proj.weight"),
        values["layers/0/0/feed_forward/experts/buckets/0/up"][1, 3].T,
    )

    import_(tmp_path / "hf", tmp_path / "back")
    assert "differ by" in verify(tmp_path / "hf", tmp_path / "back")
    back = Run(tmp_path / "back").settings
    assert back.model.num_layers == 5 and (back.loss.load_balance_loss, back.loss.dynamic_loss) == (1e-2, 1e-4)
    export(tmp_path / "back", tmp_path / "again", Options(family="MoEForCausalLM"))
    again = Reader(tmp_path / "again")
    assert again.tensors.keys() == expected
    for name in expected:
        np.testing.assert_array_equal(again.read(name), reader.read(name))


@pytest.mark.parametrize(
    "layers, fields, reason",
    [
        ((SPARSE,), {"rope_base": 5e5}, "rotary base"),
        ((SPARSE,), {"num_kv_heads": 1}, "fewer key heads"),
        ((SPARSE,), {"qk_norm": True}, "QK-norm"),
        ((PLAIN, SPARSE), {}, "the first layer is dense"),
        ((SPARSE, PLAIN, PLAIN, SPARSE, PLAIN, SPARSE), {}, "layers other than"),
        ((SPARSE, Dense(32)), {}, "layers other than"),
        ((MoE(4, 24, TopK(2)),), {}, "the router TopK"),
        ((MoE(4, 24, Nucleus(0.4, experts_per_token=2.0)),), {}, "a moving threshold"),
        ((MoE(4, 24, Nucleus(0.4, max_slots=1)),), {}, "a limit to the slots"),
        ((MoE(8, 24, Nucleus(0.4), "hybrid"),), {}, "different widths"),
    ],
    ids=str,
)
def test_what_it_cannot_say_is_told(layers, fields, reason):
    with pytest.raises(NotRepresented, match=reason):
        dynamic_moe.to_json(model(LayerGroup(layers), **fields))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"rope_theta": 5e5}, "rope_theta is 500000.0, which this layout's code ignores"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, which this layout's code ignores.*; write 2 if"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"hidden_size": "16"}, "hidden_size is '16'; it must be an integer"),
        ({"hidden_size": 17}, "hidden_size = 17 is not divisible"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"expert_frequency": 0}, "expert_frequency is 0"),
        ({"num_experts": -1}, "num_experts is -1"),
    ],
    ids=str,
)
def test_what_its_code_would_not_compute_is_refused(entries, message):
    sound = dynamic_moe.to_json(model(LayerGroup((SPARSE, PLAIN))))
    with pytest.raises(InputError, match=message):
        dynamic_moe.from_json(sound | entries)


@pytest.mark.parametrize("frequency", [1, 2, 3, 7])
def test_every_frequency(frequency):
    sound = dynamic_moe.to_json(model(LayerGroup((SPARSE, PLAIN))))
    layers = dynamic_moe.from_json(sound | {"num_hidden_layers": 5, "expert_frequency": frequency})
    assert layers.num_layers == 5 and dynamic_moe.to_json(layers)["expert_frequency"] == min(frequency, 5)
