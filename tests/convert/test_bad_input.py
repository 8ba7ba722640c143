"""What import and export refuse: one clear line, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jmoe import recipe
from jmoe.checkpoint import CheckpointError
from jmoe.config import Config, Data, Dense, InputError, LayerGroup, Model, MoE, Nucleus, TopK
from jmoe.convert import shards
from jmoe.convert.__main__ import main
from jmoe.convert.exporting import Options, export, size_in_bytes
from jmoe.convert.importing import import_
from jmoe.convert.mapping import parameter_shapes
from jmoe.convert.runs import Run, write_run
from jmoe.convert.shards import Planned, Reader, Writer
from jmoe.convert.verify import verify
from jmoe.data.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
SHAPE = Model(257, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, qk_norm=False, tie_embeddings=False)
MIXTRAL = Model(**{**vars(SHAPE), "layers": (LayerGroup((MoE(2, 24, TopK(2)),), 2),)})
SETTINGS = Config(model=MIXTRAL, data=Data(seq_len=32))
EXPERT = "model.layers.1.block_sparse_moe.experts.1.w2.weight"


def write_random(run_dir: Path, settings: Config) -> None:
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(settings.model)
    write_run(
        run_dir,
        settings,
        byte_tokenizer(),
        lambda writer: writer.write_all(lambda name: rng.normal(size=shapes[name]).astype(np.float32)),
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bad") / "run"
    write_random(path, SETTINGS)
    return path


@pytest.fixture(scope="module")
def exported(run_dir) -> Path:
    export(run_dir, run_dir.with_name("hf"), Options(max_shard_size="8KB"))
    return run_dir.with_name("hf")


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of the exported model, to be spoilt."""
    return shutil.copytree(exported, tmp_path / "hf")


def change(file: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def rewrite(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    """The folder's tensors in one file, after `edit`."""
    reader = Reader(folder)
    tensors = {name: reader.read(name) for name in reader.tensors}
    edit(tensors)
    for file in (*folder.glob("*.safetensors"), folder / shards.INDEX):
        file.unlink(missing_ok=True)
    writer = Writer(folder, [Planned(name, t.dtype, t.shape) for name, t in tensors.items()], 10**9)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def refused(folder: Path) -> str:
    """What the import says; it leaves nothing."""
    before = set(folder.parent.iterdir())
    with pytest.raises(InputError) as error:
        import_(folder, folder.parent / "run")
    assert set(folder.parent.iterdir()) == before
    return str(error.value)


def test_every_tensor_in_the_way_is_named(folder):
    def spoil(tensors):
        del tensors[EXPERT]
        tensors["model.layers.2.stray"] = np.zeros((2, 3), np.float32)
        tensors["model.norm.weight"] = np.zeros(17, np.float32)
        del tensors["lm_head.weight"]

    rewrite(folder, spoil)
    lines = refused(folder).splitlines()
    assert lines[0] == "the files do not hold the tensors of a MixtralForCausalLM of their config.json:"
    assert {line.strip() for line in lines[1:]} == {
        f"{EXPERT} [16, 24] is missing",
        "lm_head.weight [257, 16] is missing",
        "model.norm.weight is [17], expected [16]",
        "model.layers.2.stray [2, 3] is left over",
    }


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_fused_experts_and_half_precision(folder, run_dir, tmp_path, half):
    def fuse(tensors):
        for layer in range(2):
            of = [f"model.layers.{layer}.block_sparse_moe.experts.{e}" for e in range(2)]
            w1, w3, w2 = ([tensors.pop(f"{expert}.{w}.weight") for expert in of] for w in ("w1", "w3", "w2"))
            fused = f"model.layers.{layer}.mlp.experts"
            tensors[f"{fused}.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in zip(w1, w3, strict=True)])
            tensors[f"{fused}.down_proj"] = np.stack(w2)
            tensors[f"model.layers.{layer}.mlp.gate.weight"] = tensors.pop(
                f"model.layers.{layer}.block_sparse_moe.gate.weight"
            )
        for name, tensor in tensors.items():
            tensors[name] = tensor.astype(half)

    rewrite(folder, fuse)
    import_(folder, tmp_path / "run")
    was, now = Run(run_dir), Run(tmp_path / "run")
    for name in parameter_shapes(MIXTRAL):
        np.testing.assert_array_equal(now.read(name), was.read(name).astype(half).astype(np.float32))

    rewrite(folder, lambda tensors: tensors.update({f"{FUSED}.down_proj": np.zeros((3, 16, 24), half)}))
    shutil.rmtree(tmp_path / "run")
    assert f"{FUSED}.down_proj is [3, 16, 24], expected 2 experts" in refused(folder)


FUSED = "model.layers.1.mlp.experts"


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: first_file(f).write_bytes(first_file(f).read_bytes()[:-1]), "it was cut off, or added to"),
        (lambda f: first_file(f).write_bytes(first_file(f).read_bytes() + b"x"), "it was cut off, or added to"),
        (lambda f: first_file(f).write_bytes(first_file(f).read_bytes()[:20]), "cut off within its header"),
        (lambda f: first_file(f).write_bytes(b""), "is no safetensors file"),
        (lambda f: first_file(f).write_bytes((8).to_bytes(8, "little") + b"not json"), "is not JSON"),
        (lambda f: first_file(f).unlink(), "which is not there"),
        (lambda f: (f / shards.INDEX).unlink(), "has neither model.safetensors nor model.safetensors.index.json"),
        (lambda f: (f / shards.INDEX).write_text("[]"), "is no JSON object"),
        (lambda f: change(f / shards.INDEX, lambda c: c.clear()), "has no weight_map"),
        (
            lambda f: change(f / shards.INDEX, lambda c: c["weight_map"].update({EXPERT: "../secret.safetensors"})),
            "it must be a plain name",
        ),
        (
            lambda f: change(f / shards.INDEX, lambda c: c["weight_map"].update({EXPERT: "pytorch_model.bin"})),
            "it must be a plain name",
        ),
        (
            lambda f: change(f / shards.INDEX, lambda c: c["weight_map"].update({EXPERT: first_file(f).name})),
            f"does not hold the tensor {EXPERT}",
        ),
        (lambda f: change(f / shards.INDEX, lambda c: c["weight_map"].pop(EXPERT)), f"holds the tensor {EXPERT}"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read: No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "tokenizer.json").unlink(), "give one with --tokenizer"),
    ],
)
def test_damaged_files(folder, spoil, told):
    spoil(folder)
    assert told in refused(folder)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not supported; it must be one of llama"),
        ({"architectures": ["MixtralForTokenClassification"]}, "MixtralForCausalLM is"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters of type 'linear' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": "two"}, "num_key_value_heads is 'two'; it must be of type int"),
        ({"num_local_experts": None}, "has no num_experts or num_local_experts"),
        ({"num_experts_per_tok": 3}, "router.k is 3; it must be between 1 and num_experts = 2"),
        ({"vocab_size": 256}, "model.vocab_size = 256 is too small: the tokenizer has 257 ids"),
        ({"eos_token_id": 300}, "has no token 300"),
        ({"tie_word_embeddings": True}, "the files hold another lm_head.weight"),
    ],
)
def test_what_jmoe_lacks_is_named(folder, entries, told):
    change(folder / "config.json", lambda content: content.update(entries))
    assert told in refused(folder)


def test_every_tensor_is_written_once_in_any_order(tmp_path):
    tensors = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("abc")}
    writer = Writer(tmp_path, [Planned(name, t.dtype, t.shape) for name, t in tensors.items()], 48)
    for name in "cb":
        writer.write(name, tensors[name])
    for name, tensor in (("b", tensors["b"]), ("d", tensors["b"]), ("a", np.zeros((3, 2), np.float32))):
        with pytest.raises(ValueError, match=f"{name} .* is given"):
            writer.write(name, tensor)
    with pytest.raises(ValueError, match="a were not written"):
        writer.close()
    writer.write("a", tensors["a"])
    writer.close()
    reader = Reader(tmp_path)
    files = [reader.tensors[name].file.name for name in "abc"]
    assert files == ["model-00001-of-00002.safetensors"] * 2 + ["model-00002-of-00002.safetensors"]  # 48 bytes are two
    assert all(tensor.start % 8 == 0 for tensor in reader.tensors.values())
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(reader.read(name), tensor)


def test_what_older_folders_hold(folder, tmp_path):
    """Rotary frequencies among the tensors, several ends of a text, more positions than rows should have."""
    rewrite(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    )
    change(folder / "config.json", lambda c: c.update(eos_token_id=[256, 10], max_position_embeddings=131072))
    import_(folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert (run.tokenizer.eos, run.settings.data.seq_len) == (256, 4096)


def test_a_bias_that_the_family_always_has_is_zero(tmp_path):
    router = TopK(2, "sigmoid")
    layers = (LayerGroup((Dense(24),)), LayerGroup((MoE(4, 24, router, shared_d_ff=24),)))
    write_random(tmp_path / "run", Config(model=Model(**{**vars(SHAPE), "qk_norm": True, "layers": layers})))
    assert export(tmp_path / "run", tmp_path / "hf").model_type == "dots1"
    bias = Reader(tmp_path / "hf").read("model.layers.1.mlp.gate.e_score_correction_bias")
    np.testing.assert_array_equal(bias, np.zeros(4, np.float32))


def test_headers_that_lie(tmp_path):
    def header(**entry) -> bytes:
        text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
        return len(text).to_bytes(8, "little") + text + bytes(8)

    file = tmp_path / "model.safetensors"
    for entry, told in (
        ({"dtype": "F8_E4M3"}, "the tensor a is F8_E4M3; only F32, F16, BF16 are read"),
        ({"shape": [3]}, "8 bytes are not what the tensor a"),
        ({"shape": [-2]}, "entry of the tensor a is not sound"),
        ({"data_offsets": [4, 12]}, "a hole or an overlap at byte 0"),
        ({"data_offsets": 8}, "entry of the tensor a is not sound"),
    ):
        file.write_bytes(header(**entry))
        with pytest.raises(InputError, match=told):
            Reader(tmp_path)
    file.write_bytes(header())
    np.testing.assert_array_equal(Reader(tmp_path).read("a"), np.zeros(2))


def test_models_that_no_family_represents(tmp_path):
    layers = (LayerGroup((Dense(24), MoE(8, 16, Nucleus(p=0.4)))),)
    write_random(tmp_path / "run", Config(model=Model(**{**vars(SHAPE), "layers": layers})))
    with pytest.raises(InputError, match="--family MixtralForCausalLM does not represent .*: the router Nucleus"):
        export(tmp_path / "run", tmp_path / "hf", Options(family="MixtralForCausalLM"))
    with pytest.raises(InputError, match="--family Mixtral does not .*: it is unknown, and must be one of Llama"):
        export(tmp_path / "run", tmp_path / "hf", Options(family="Mixtral"))
    assert not (tmp_path / "hf").exists()


def test_folders_that_are_there_and_runs_that_are_not(run_dir, exported, tmp_path):
    (tmp_path / "file").write_text("mine")
    for convert, source in ((export, run_dir), (import_, exported)):
        with pytest.raises(InputError, match="is there already"):
            convert(source, tmp_path)
        with pytest.raises(InputError, match="is there already"):
            convert(source, tmp_path / "file")
    with pytest.raises(InputError, match="is no run directory"):
        export(tmp_path, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="step 3 .* no such checkpoint"):
        export(run_dir, tmp_path / "hf", Options(step=3))
    damaged = shutil.copytree(run_dir, tmp_path / "run")
    file = damaged / "checkpoints/0/params/embedding/c/0/0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        export(damaged, tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "run"}


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_full_disk_leaves_nothing(run_dir, exported, tmp_path, command):
    source = run_dir if command == "export" else exported
    limited = subprocess.run(
        # A file may not grow beyond 10 KB: writes fail, as on a full disk. (Python ignores the signal of that.)
        ["bash", "-c", f"ulimit -f 10; exec {sys.executable} -m jmoe.convert {command} {source} {tmp_path / 'out'}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert limited.returncode == 1
    assert "error: " in limited.stderr and "out could not be written" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(run_dir, tmp_path, capsys):
    main(["export", str(run_dir), str(tmp_path / "hf"), "--dtype", "bf16"])
    main(["import", str(tmp_path / "hf"), str(tmp_path / "run"), "--verify"])
    out = capsys.readouterr().out
    assert "MixtralForCausalLM, bf16" in out and "random tokens differ by" in out and "--init-from" in out
    for argv, told in (
        ([], "unknown command ''; it must be one of export, import"),
        (["export"], "RUN_DIR is missing; it comes first"),
        (["export", "a"], "OUT_DIR is missing; it comes after RUN_DIR"),
        (["export", "a", "b", "--dtype", "int8"], "int8"),
        (["export", str(run_dir), "b", "--max-shard-size", "much"], "it must be a size such as 500MB or 5GB"),
    ):
        with pytest.raises(InputError, match=told):
            main(argv)
    assert (size_in_bytes("1.5MB"), size_in_bytes("200"), size_in_bytes("5gb")) == (1_500_000, 200, 5 * 10**9)


def test_verify_notices_another_model(run_dir, exported, tmp_path):
    rewrite(shutil.copytree(exported, tmp_path / "hf"), lambda tensors: tensors[EXPERT].__imul__(1.01))
    with pytest.raises(InputError, match="does not compute what .* says: logits of 32 random tokens differ by"):
        verify(tmp_path / "hf", run_dir)


def test_settings_travel_through_json(run_dir):
    assert recipe.from_dict(recipe.to_dict(SETTINGS)) == Run(run_dir).settings
