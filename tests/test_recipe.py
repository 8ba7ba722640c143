"""Recipes, flags and the JSON form of a configuration."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jmoe import recipe
from jmoe.config import (
    BPE,
    TFDS,
    WSD,
    AdamW,
    ByRole,
    Bytes,
    Checkpoint,
    Config,
    Constant,
    Cosine,
    Data,
    Dense,
    Embedded,
    Files,
    InputError,
    LayerGroup,
    Mesh,
    Model,
    MoE,
    Muon,
    NorMuon,
    Nucleus,
    RaggedAllToAll,
    TokenizerFile,
    TopK,
)

LAYERS = (
    LayerGroup((Dense(64),), 1),
    LayerGroup((MoE(8, 32, TopK(2)), MoE(16, 16, Nucleus(0.3)), Dense(48)), 3),
)
MIXED = Config(
    model=Model(layers=LAYERS, qk_norm=False, rope_base=5e5),
    data=Data(
        sources=(Embedded(0.1), Files("a/**/*.jsonl.zst", "body", 0.2), TFDS("x/y:1.0.0", data_dir="d")),
        validation=(Files("v.txt"),),
        tokenizer=BPE(1000),
    ),
    optim=AdamW(learning_rate=1 / 3, schedule=WSD(shape="linear")),
    mesh=Mesh(data=-1),
    transport=RaggedAllToAll(1.25),
    checkpoint=Checkpoint(keep_every=7),
    dtype="bfloat16",
    run_dir="runs/ü",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a script."""

    dry: bool = False
    """only check the command line [switch]"""
    prompt: str | None = None
    """text to begin with [text]"""


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# ----------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        MIXED,
        *(Config(model=Model(layers=(LayerGroup((kind,), 2),))) for kind in (Dense(), MoE(), MoE(router=TopK(3)))),
        *(Config(data=Data(sources=(kind,))) for kind in (Embedded(), Files("*.txt"), TFDS("wiki"))),
        *(Config(data=Data(tokenizer=kind)) for kind in (Bytes(), BPE(), TokenizerFile("t.json", "</s>"))),
        *(Config(optim=AdamW(schedule=kind)) for kind in (Cosine(3), WSD(4), Constant(5))),
        Config(optim=Muon(schedule=WSD(), learning_rates=ByRole(head=0.5), matrices=("experts",), heads="apart")),
        Config(optim=NorMuon(decays=ByRole(norm=0.0), output_decay=0.9)),
    ],
)
def test_json_round_trip_is_exact(config):
    text = json.dumps(recipe.to_dict(config))
    assert recipe.from_dict(json.loads(text)) == config


def test_members_of_unions_are_tagged_and_nothing_else():
    tree = recipe.to_dict(MIXED)
    assert tree["data"]["tokenizer"] == {"kind": "BPE", "vocab_size": 1000, "train_megabytes": 16.0}
    router = tree["model"]["layers"][1]["pattern"][0]["router"]
    assert router.pop("kind") == "TopK" and router == dataclasses.asdict(TopK(2))
    assert [group["pattern"][0]["kind"] for group in tree["model"]["layers"]] == ["Dense", "MoE"]
    assert "kind" not in tree and "kind" not in tree["model"] and "kind" not in tree["model"]["layers"][0]


def test_fields_younger_than_the_file_take_their_defaults():
    tree = recipe.to_dict(MIXED)
    del tree["remat"], tree["optim"]["b2"], tree["data"]["sources"][1]["text_key"]
    expected_files = Files("a/**/*.jsonl.zst", weight=0.2)
    sources = (MIXED.data.sources[0], expected_files, MIXED.data.sources[2])
    assert recipe.from_dict(tree) == dataclasses.replace(MIXED, data=dataclasses.replace(MIXED.data, sources=sources))


def test_a_file_from_before_there_was_a_choice_of_optimisers_means_adamw():
    tree = recipe.to_dict(MIXED)
    assert tree["optim"].pop("kind") == "AdamW"
    assert recipe.from_dict(tree) == MIXED


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(stepz=1), "unknown key stepz; did you mean steps?"),
        (lambda t: t["model"].update(d_modl=1), "unknown key model.d_modl; did you mean model.d_model?"),
        (lambda t: t["model"].update(kind="Model"), "unknown key model.kind"),
        (lambda t: t.update(steps=1.0), "steps is 1.0; it must be an integer"),
        (lambda t: t.update(steps=True), "steps is True; it must be an integer"),
        (lambda t: t["optim"].update(eps="1e-8"), "optim.eps is '1e-8'; it must be a number"),
        (lambda t: t["optim"].update(clip_norm=math.inf), "optim.clip_norm is inf; it must be finite"),
        (lambda t: t["optim"].update(clip_norm=-math.inf), "optim.clip_norm is -inf; it must be finite"),
        (lambda t: t["optim"].update(clip_norm=10**400), "optim.clip_norm is inf; it must be finite"),
        (lambda t: t["data"]["sources"][0].update(weight=math.nan), "data.sources.0.weight is nan; it must be finite"),
        (lambda t: t["model"].update(qk_norm=1), "model.qk_norm is 1; it must be true or false"),
        (lambda t: t.update(run_dir=3), "run_dir is 3; it must be text or None"),
        (lambda t: t.update(dtype="fp8"), "dtype is 'fp8'; it must be float32 or bfloat16"),
        (lambda t: t.update(model=[]), "model is []; it must be Model"),
        (lambda t: t["model"].update(layers={}), "model.layers is {}; it must be a list"),
        (lambda t: t["data"]["tokenizer"].update(kind="Bpe"), "kind is 'Bpe'; it must be Bytes, BPE or TokenizerFile"),
        (lambda t: t["data"]["tokenizer"].update(kind=[]), "data.tokenizer: kind is []"),
        (lambda t: t["data"]["sources"][2].pop("kind"), "data.sources.2: kind is None"),
        (lambda t: t["data"]["sources"][1].update(split="a"), "unknown key data.sources.1.split"),
        (
            lambda t: t["model"]["layers"][1]["pattern"][1]["router"].update(p=2.0),
            "model.layers.1.pattern.1.router: router.p is 2.0",
        ),
        (lambda t: t.update(batch_size=5, accumulation=2), "batch_size = 5 is not divisible by accumulation = 2"),
    ],
)
def test_bad_json_is_refused_with_its_place(change, says):
    tree = recipe.to_dict(MIXED)
    change(tree)
    with pytest.raises(InputError) as caught:
        recipe.from_dict(tree)
    assert says in one_line(caught)


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_json_that_is_no_object_is_refused(value):
    with pytest.raises(InputError, match=r"config is .*; it must be Config"):
        recipe.from_dict(value)


# ---------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "read", "value"),
    [
        ("--steps 200", lambda c: c.steps, 200),
        ("--steps=200", lambda c: c.steps, 200),
        ("--steps 100 --steps 200", lambda c: c.steps, 200),
        ("--optim.learning-rate 1e-3", lambda c: c.optim.learning_rate, 1e-3),
        ("--optim.learning_rate 1", lambda c: c.optim.learning_rate, 1.0),
        ("--optim Muon --optim.decays.norm 0", lambda c: c.optim, Muon(decays=ByRole(norm=0.0))),
        ("--mesh.fsdp -1 --mesh.data 1", lambda c: c.mesh.fsdp, -1),
        ("--model.qk-norm", lambda c: c.model.qk_norm, True),
        ("--model.qk-norm true", lambda c: c.model.qk_norm, True),
        ("--model.tie-embeddings False --steps 30", lambda c: c.model.tie_embeddings, False),
        ("--dtype float32", lambda c: c.dtype, "float32"),
        ("--run-dir None", lambda c: c.run_dir, None),
        ("--run-dir none", lambda c: c.run_dir, "none"),
        ("--run-dir NONE", lambda c: c.run_dir, "NONE"),
        ("--run-dir -h", lambda c: c.run_dir, "-h"),
        ("--run-dir=--help", lambda c: c.run_dir, "--help"),
        ("--run-dir=", lambda c: c.run_dir, ""),
        ("--checkpoint.keep-every none", lambda c: c.checkpoint.keep_every, None),
        ("--run-dir 17", lambda c: c.run_dir, "17"),
        ("--checkpoint.keep-every 5", lambda c: c.checkpoint.keep_every, 5),
        ("--model.layers.1.pattern.1.router.p 0.6", lambda c: c.model.layers[1].pattern[1].router, Nucleus(0.6)),
        ("--model.layers.1.pattern.1.router TopK", lambda c: c.model.layers[1].pattern[1].router, TopK()),
        (
            "--model.layers.0.pattern.0 MoE --model.layers.0.pattern.0.router.p .5",
            lambda c: c.model.layers[0].pattern[0],
            MoE(router=Nucleus(0.5)),
        ),
        (
            "--model.layers.1.pattern.0.num-experts 3 --model.layers.1.pattern.0.d-ff [4,5,6]",
            lambda c: c.model.layers[1].pattern[0].d_ff,
            (4, 5, 6),
        ),
        ("--model.layers.1.pattern.0.d-ff 7", lambda c: c.model.layers[1].pattern[0].d_ff, 7),
        ("--optim.schedule Cosine --optim.schedule.final 0", lambda c: c.optim.schedule, Cosine(final=0.0)),
        ('--optim.schedule {"kind":"Constant","warmup_steps":3}', lambda c: c.optim.schedule, Constant(3)),
        ('--data.sources [{"kind":"Files","glob":"*.txt"}]', lambda c: c.data.sources, (Files("*.txt"),)),
        ("--data.sources.0 Files --data.sources.0.glob x", lambda c: c.data.sources[0], Files("x")),
        ("--data.validation []", lambda c: c.data.validation, ()),
        ("--batch-size 9 --accumulation 3", lambda c: (c.batch_size, c.accumulation), (9, 3)),
    ],
)
def test_flags_change_what_they_name(flags, read, value):
    changed = recipe.override(MIXED, flags.split())
    assert read(changed) == value and type(read(changed)) is type(value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--stps 3", "unknown flag --stps; did you mean --steps?"),
        ("-steps 3", "unknown flag -steps; did you mean --steps?"),
        ("--learning-rate 3", "unknown flag --learning-rate; did you mean --optim.learning-rate?"),
        ("--shape linear", "unknown flag --shape; did you mean --optim.schedule.shape?"),
        ("--zzzzzz 3", "unknown flag --zzzzzz; --help lists all flags"),
        ("--model.layers.2.repeats 3", "unknown flag --model.layers.2.repeats; did you mean --model.layers.1.repeats?"),
        ("--steps foo", "--steps is 'foo'; it must be an integer"),
        ("--steps 1.5", "--steps is '1.5'; it must be an integer"),
        ("--optim.eps x", "--optim.eps is 'x'; it must be a number"),
        ("--model.qk-norm 1", "--model.qk-norm is '1'; it must be true or false"),
        ("--dtype fp8", "--dtype is 'fp8'; it must be float32 or bfloat16"),
        ("--steps", "--steps needs a value: INT"),
        ("--steps --dtype float32", "--steps needs a value: INT"),
        ("--steps -h", "--steps needs a value: INT"),
        ("--run-dir", "--run-dir needs a value: STR|None"),
        ("--run-dir --steps 3", "STR|None; if --steps is meant as text, write --run-dir=--steps"),
        ("--run-dir --help", "STR|None; if --help is meant as text, write --run-dir=--help"),
        ("--optim.eps nan", "--optim.eps is nan; it must be finite"),
        ("--optim.eps -inf", "--optim.eps is -inf; it must be finite"),
        ("--optim.clip-norm 1e999", "--optim.clip-norm is inf; it must be finite"),
        ('--data.sources [{"kind":"Files","glob":"x","weight":NaN}]', "--data.sources.0.weight is nan; it must be"),
        ("--steps 30 40", "unexpected '40'"),
        ("--optim Muonn", "--optim: kind is 'Muonn'; it must be AdamW, Muon or NorMuon; did you mean Muon?"),
        ("--optim.momentum 0.9", "unknown flag --optim.momentum"),
        ("--optim.schedule Cosin", "--optim.schedule: kind is 'Cosin'; it must be Cosine, WSD or Constant"),
        ("--data.sources x", "--data.sources is 'x'; it must be JSON"),
        ("--data.sources 3", "--data.sources is 3; it must be a list"),
        ("--data.sources []", "data.sources is empty"),
        ('--data.sources [{"kind":"Files","globe":"x"}]', "did you mean --data.sources.0.glob?"),
        ("--steps 0", "steps is 0; it must be at least 1"),
        ("--steps 5", "optim.schedule.warmup_steps = 20 is more than steps = 5"),
        ("--model.layers.1.pattern.0.router.k 9", "model.layers.1.pattern.0: router.k is 9"),
        ("--model.layers.1.pattern.1.router.p 1.5", "router.p is 1.5"),
        ("--batch-size 9 --accumulation 2", "batch_size = 9 is not divisible by accumulation = 2"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, says):
    with pytest.raises(InputError) as caught:
        recipe.override(MIXED, flags.split())
    assert says in one_line(caught)


def leaves(tree, name=""):
    if isinstance(tree, dict | list):
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [leaf for key, value in parts if key != "kind" for leaf in leaves(value, f"{name}.{key}")]
    return [(name[1:], tree)]


def test_every_field_is_a_flag():
    values = {name: value for name, value in leaves(recipe.to_dict(MIXED)) if value != []}
    assert len(values) > 60
    for name, value in values.items():
        assert recipe.override(MIXED, [f"--{name}", str(value)]) == MIXED, name


def test_help_explains_every_flag_with_unit_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        recipe.override(MIXED, ["--help", "--stps", "3"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    entries = dict(re.findall(r"^  --(\S+) .*?\(default: (.*)\)$", text, re.MULTILINE))
    for name, value in leaves(recipe.to_dict(MIXED)):
        assert entries[name.replace("_", "-")] == str(value), name
    lines = text.splitlines()
    at = lines.index("  --optim.schedule.shape {linear,1-sqrt,exponential} (default: linear)")
    assert lines[at + 1] == "      course of the decay; an exponential one needs a `final` above 0 [name]"
    assert "  --model.layers.1.pattern.0.router {TopK,Nucleus} (default: TopK)" in lines


@pytest.mark.parametrize("flags", ["-h", "--help", "--model.qk-norm --help", "--model.qk-norm -h"])
def test_help_stands_where_a_flag_may_and_shows_what_stands_before_it(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        recipe.override(MIXED, ["--optim.schedule", "Cosine", *flags.split()])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "  --optim.schedule {Cosine,WSD,Constant} (default: Cosine)\n" in text
    assert f"  --model.qk-norm BOOL (default: {'qk' in flags})\n" in text
    assert "  --optim.schedule.final FLOAT (default: 0.1)\n" in text and "optim.schedule.shape" not in text


def test_every_single_value_of_the_configuration_has_a_meaning_with_a_unit():
    for flag in recipe._flags(recipe.to_dict(MIXED), Config):
        if not isinstance(flag.value, dict | list):
            assert re.search(r"\S \[[^\]]+\]$", flag.meaning), flag.name


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = "from jmoe.config import Config, Mesh\n\n\ndef config():\n    return Config(steps=40, mesh=Mesh(data=2))\n"
    (tmp_path / "small.py").write_text(text)
    (tmp_path / "base.py").write_text("")
    return tmp_path


def test_a_recipe_gives_its_configuration(folder):
    assert recipe.load(folder / "small.py") == Config(steps=40, mesh=Mesh(data=2))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", "r.py has no `def config() -> Config`"),
        ("def config(:\n", "r.py:1: SyntaxError"),
        ("x = 1\nimport no_such_module\n", "r.py:2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def config():\n    return 1 / 0\n", "r.py:2: ZeroDivisionError"),
        ("def config():\n    open('/no/such')\n", "r.py:2: FileNotFoundError"),
        ("def config():\n    raise KeyError\n", "r.py:2: KeyError"),
        ("def config():\n    raise ValueError('a\\nb')\n", "r.py:2: ValueError: a"),
        ("def config():\n    return {}\n", "r.py: config() returned dict; it must return a Config"),
        ("from jmoe.config import *\n\ndef config():\n    return Config(steps=0)\n", "r.py:4: steps is 0"),
        ("from jmoe.config import *\nconfig = lambda: Config(stps=1)\n", "r.py:2: TypeError"),
        (
            "from jmoe.config import *\nconfig = lambda: Config(optim=AdamW(clip_norm=float('inf')))\n",
            "r.py: optim.clip_norm is inf; it must be finite",
        ),
    ],
)
def test_a_failing_recipe_is_told_in_one_line(tmp_path, text, says):
    (tmp_path / "r.py").write_text(text)
    with pytest.raises(InputError) as caught:
        recipe.load(tmp_path / "r.py")
    assert says in one_line(caught)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", 50.5, "r.py: steps is 50.5; it must be an integer"),
        ("model", Data(), "r.py: model is a Data; it must be Model"),
        ("optim", None, "r.py: optim is None; it must be AdamW, Muon or NorMuon"),
        ("run_dir", Path("runs"), "r.py: run_dir is "),
    ],
)
def test_a_recipe_with_values_of_the_wrong_type_is_refused(tmp_path, monkeypatch, field, value, says):
    # Set from outside: under test, beartype would refuse these in the constructor.
    config = Config()
    object.__setattr__(config, field, value)
    monkeypatch.setattr("builtins.given", config, raising=False)
    (tmp_path / "r.py").write_text("def config():\n    return given\n")
    with pytest.raises(InputError) as caught:
        recipe.load(tmp_path / "r.py")
    assert says in one_line(caught)


def test_a_missing_recipe_brings_a_suggestion(folder):
    with pytest.raises(InputError, match=r"there is no recipe .*smal; did you mean .*small.py?"):
        recipe.load(folder / "smal")
    with pytest.raises(InputError, match=r"there is no recipe .*xxxxxxxx.py$"):
        recipe.load(folder / "xxxxxxxx.py")
    with pytest.raises(InputError, match="directory"):
        recipe.load(folder)


# -------------------------------------------------------------------------------------------------------- command lines


def test_a_training_command_line(folder):
    small = folder / "small.py"
    path, config, options = recipe.parse([str(small), "--dry", "--steps", "50"], Options(), default="none.py")
    assert path == small and options == Options(dry=True)
    assert config == Config(steps=50, mesh=Mesh(data=2), run_dir="runs/small")
    path, config, options = recipe.parse(["--run-dir", "here"], Options(), default=small)
    assert path == small and options == Options() and config.run_dir == "here"


def test_the_recipe_comes_first(folder):
    with pytest.raises(InputError, match=r"unexpected .*small\.py"):
        recipe.parse(["--steps", "50", "small.py"], Options(), default=folder / "small.py")


def test_a_command_line_with_one_argument():
    read = recipe.arguments(["runs/x", "--prompt", "def "], Options(), name="RUN_DIR", meaning="a run's directory")
    assert read == ("runs/x", Options(prompt="def "))
    with pytest.raises(InputError, match="RUN_DIR is missing"):
        recipe.arguments(["--dry"], Options(), name="RUN_DIR", meaning="a run's directory")


SCRIPT = """
import sys
from dataclasses import dataclass

from jmoe import recipe


@dataclass(frozen=True)
class Options:
    dry: bool = False
    "no work [switch]"


with recipe.exit_on_input_error():
    path, config, options = recipe.parse(sys.argv[1:], Options(), default="small.py")
    print(config.steps, options.dry)
"""


def test_a_script_shows_help_and_exit_codes(folder):
    (folder / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(recipe.__file__).parents[1])}

    def run(*argv: str) -> tuple[int, str, str]:
        command = [sys.executable, "script.py", *argv]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: python script.py [RECIPE] [--flag value ...]\n")
    assert "  --dry BOOL (default: False)\n      no work [switch]\n" in out
    assert "  --steps INT (default: 40)\n      optimiser steps in all [steps]\n" in out
    assert run("--stps", "3") == (2, "", "error: unknown flag --stps; did you mean --steps?\n")
    assert run("smal.py") == (2, "", "error: there is no recipe smal.py; did you mean small.py?\n")
    assert run("small.py", "--steps=21", "--dry") == (0, "21 True\n", "")


def test_input_error_ends_a_script_with_its_message_and_code_2(capsys):
    with pytest.raises(SystemExit) as caught, recipe.exit_on_input_error():
        raise InputError("steps is 0; it must be at least 1")
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: steps is 0; it must be at least 1\n")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), recipe.exit_on_input_error():
        _ = 1 / 0
