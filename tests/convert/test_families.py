"""Every family against transformers: the same model in both directions, logits, greedy tokens, gradients."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe
from jmoe.checkpoint import flatten
from jmoe.config import Config, Data, Dense, InputError, LayerGroup, Model, MoE, TopK
from jmoe.convert.exporting import Options, export
from jmoe.convert.importing import import_
from jmoe.convert.mapping import parameter_shapes
from jmoe.convert.runs import Run, write_run
from jmoe.convert.verify import verify
from jmoe.data.tokenizer import byte_tokenizer, train_bpe
from jmoe.model.attention import Place, positions_in_row

pytestmark = pytest.mark.torch
torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {"vocab_size": 264, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.3}
SHAPE |= {"tie_embeddings": False, "qk_norm": False, "norm_eps": 1e-5, "rope_base": 5e4}
SOFTMAX = TopK(2, renormalise=False)
SIGMOID = TopK(3, "sigmoid", scale=2.5, groups=4, groups_per_token=2, bias_rate=1e-3)
SHARED = MoE(4, 24, SOFTMAX, shared_d_ff=40, shared_gate=True)
DEEPSEEK = (LayerGroup((Dense(40),)), LayerGroup((MoE(8, 24, SIGMOID, shared_d_ff=48),), 2))


def model(*layers: LayerGroup, **fields: Any) -> Model:
    return Model(**{**SHAPE, "head_dim": 8, "layers": layers, **fields})


MODELS = {
    "llama": model(LayerGroup((Dense(40),), 2), tie_embeddings=True),
    "qwen2": model(LayerGroup((Dense(40),), 2), qkv_bias=True, head_dim=4),
    "qwen3": model(LayerGroup((Dense(40),), 2), qk_norm=True),
    "mixtral": model(LayerGroup((MoE(4, 24, TopK(2)),), 2)),
    "qwen2_moe": model(LayerGroup((SHARED,), 2), qkv_bias=True, head_dim=4),
    "qwen3_moe": model(LayerGroup((Dense(40), MoE(4, 24, SOFTMAX)), 2), qk_norm=True),
    "olmoe": model(LayerGroup((MoE(4, 24, SOFTMAX),), 2), qk_norm=True, qk_norm_over="projection", head_dim=4),
    "dots1": model(*DEEPSEEK, qk_norm=True),
    "glm4_moe": model(*DEEPSEEK, qkv_bias=True),
}
TOKENS = np.random.default_rng(1).integers(0, 257, (2, 24), np.int32)


class Exported(NamedTuple):
    family: str
    run: Path
    folder: Path
    logits: np.ndarray
    theirs: Any


def write_random(run_dir: Path, settings: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A run whose every parameter is random, so that none can be mistaken for another."""
    rng, values = np.random.default_rng(seed), {}
    for name, shape in parameter_shapes(settings.model).items():
        scale, mean = (0.1, 1.0) if name.endswith("gain") else (0.2, 0.0)
        values[name] = (mean + scale * rng.normal(size=shape)).astype(np.float32)
    write_run(run_dir, settings, byte_tokenizer(), lambda writer: writer.write_all(values.__getitem__))
    return values


def load_theirs(folder: Path) -> Any:
    """The folder's model by transformers, with nothing missing, left over or of another shape."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return theirs.eval()


def their_logits(theirs: Any) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.from_numpy(TOKENS).long()).logits.numpy()


def assert_close(ours: Any, theirs: np.ndarray, limit: float = 1e-5) -> None:
    assert np.abs(np.asarray(ours) - theirs).max() <= limit * np.abs(theirs).max()


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    settings = Config(model=MODELS[request.param], data=Data(seq_len=32))
    write_random(folder / "run", settings)
    export(folder / "run", folder / "hf", Options(max_shard_size="20KB"))
    logits = np.asarray(jmoe.load(folder / "run").logits(TOKENS))
    return Exported(request.param, folder / "run", folder / "hf", logits, load_theirs(folder / "hf"))


def test_transformers_computes_the_same(exported):
    assert exported.theirs.config.model_type == exported.family
    assert_close(exported.logits, their_logits(exported.theirs))


def test_greedy_tokens_are_the_same(exported):
    prompt = TOKENS[:1, :8]
    sampling = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = exported.theirs.generate(torch.from_numpy(prompt).long(), **sampling)[0].numpy()
    ours, run = np.zeros_like(TOKENS), jmoe.load(exported.run)
    ours[0, :8] = prompt
    for i in range(8, 20):  # by the compiled function that there is: what stands behind a token does not matter to it
        ours[0, i] = np.asarray(run.logits(ours))[0, i - 1].argmax()
    np.testing.assert_array_equal(ours[0, :20], theirs)


def test_what_is_exported_comes_back_bit_for_bit(exported, tmp_path):
    import_(exported.folder, tmp_path / "back")
    was, back = Run(exported.run), Run(tmp_path / "back")
    assert back.settings.model == was.settings.model
    assert back.settings.loss.load_balance_loss == pytest.approx(
        was.settings.loss.load_balance_loss if exported.family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe") else 0
    )
    for name in parameter_shapes(was.settings.model):
        np.testing.assert_array_equal(back.read(name), was.read(name))


def test_bfloat16_files_come_back_bit_for_bit(exported, tmp_path):
    export(exported.run, tmp_path / "hf", Options(dtype="bf16"))
    import_(tmp_path / "hf", tmp_path / "back")
    was, back = Run(exported.run), Run(tmp_path / "back")
    for name in parameter_shapes(was.settings.model):
        rounded = was.read(name) if name.endswith("router/bias") else was.read(name).astype(jnp.bfloat16)
        np.testing.assert_array_equal(back.read(name), rounded.astype(np.float32))


def check_import(configuration: Any, tokenizer: Path, tmp_path: Path) -> None:
    """A random model of transformers computes the same when it is imported."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        configuration, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, value in (*theirs.named_parameters(), *theirs.named_buffers()):
            if "inv_freq" not in name:
                value.normal_(1.0 if "norm" in name else 0.0, 0.2)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    import_(tmp_path / "hf", tmp_path / "run")
    assert_close(jmoe.load(tmp_path / "run").logits(TOKENS), their_logits(theirs))
    assert "differ by" in verify(tmp_path / "hf", tmp_path / "run")


def test_a_model_of_transformers_is_imported(exported, tmp_path):
    configuration = transformers.AutoConfig.from_pretrained(exported.folder)
    check_import(configuration, exported.folder / "tokenizer.json", tmp_path)


def test_mistral_is_imported(tmp_path):
    """It is another name for Llama's tensors, so that jmoe never exports to it."""
    fields = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None}
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    check_import(transformers.MistralConfig(**fields, **heads, eos_token_id=256), tmp_path / "tokenizer.json", tmp_path)
    assert Run(tmp_path / "run").settings.model.head_dim == 8
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": 8}))
    with pytest.raises(InputError, match="sliding_window = 8 is not supported"):
        import_(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize("family", ["qwen2_moe", "dots1"])
def test_gradients_are_the_same(family, tmp_path):
    settings = Config(model=MODELS[family], data=Data(seq_len=32))
    write_random(tmp_path / "run", settings)
    export(tmp_path / "run", tmp_path / "hf")
    theirs = load_theirs(tmp_path / "hf")
    tokens = torch.from_numpy(TOKENS).long()
    theirs(tokens, labels=tokens).loss.backward()

    run = jmoe.load(tmp_path / "run")
    ids, ones, positions = jnp.asarray(TOKENS), jnp.ones_like(TOKENS), positions_in_row(*TOKENS.shape)

    @jax.jit
    @jax.grad
    def gradient(params):
        hidden, _, _ = params(ids, Place(ones, positions, ones, positions))
        log_probabilities = jax.nn.log_softmax(params.logits(hidden)[:, :-1])
        return -jnp.take_along_axis(log_probabilities, ids[:, 1:, None], axis=-1).mean()

    ours = {name: np.asarray(value) for name, value in flatten(gradient(run.params)).items()}
    # As if they were parameters: exported, and read into the names and shapes that transformers has in memory.
    write_run(tmp_path / "gradient", settings, byte_tokenizer(), lambda writer: writer.write_all(ours.__getitem__))
    export(tmp_path / "gradient", tmp_path / "hf-gradient")
    as_theirs = dict(load_theirs(tmp_path / "hf-gradient").named_parameters())
    largest = max(float(value.grad.abs().max()) for value in theirs.parameters())
    for name, value in theirs.named_parameters():
        difference = float((value.grad - as_theirs[name].detach()).abs().max())
        assert difference <= 1e-5 * largest, name


def test_the_tokenizer_gives_the_same_ids(tmp_path):
    texts = ["def f(x):\n\treturn x ** 2", "naïve 東京 \x00", "  two  spaces ", ""]
    for number, tokenizer in enumerate((byte_tokenizer(), train_bpe(texts * 3, 300))):
        settings = Config(model=MODELS["llama"])
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, vocab_size=300))
        zeros = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(settings.model).items()}
        run, folder = tmp_path / f"run{number}", tmp_path / f"hf{number}"
        write_run(run, settings, tokenizer, lambda writer, of=zeros: writer.write_all(of.__getitem__))
        export(run, folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eos
        for text in texts:
            assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
            assert theirs.decode(tokenizer.encode(text)) == text
        assert theirs(theirs.eos_token + "a")["input_ids"] == [tokenizer.eos, *tokenizer.encode("a")]
