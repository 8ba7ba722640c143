"""python -m jmoe.aot: train steps compiled for TPU topologies with no TPU present."""

import json

import pytest

from jmoe import aot, recipe
from jmoe.config import InputError

RECIPE = "configs/dynamic_374m.py"
# The recipe's shapes with fewer layers, and a smaller vocabulary, which so few layers would be little beside.
SMALLER = ["--model.layers.0.repeats", "2", "--model.vocab-size", "2048", "--mesh.fsdp", "4"]
LARGE = ["--batch-size", "16", "--data.seq-len", "4096"]
SMALL = ["--batch-size", "4", "--data.seq-len", "512", "--model.layers.0.pattern.1.num-experts", "8"]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "size", "most"), [("v5p:2x2x1", LARGE, 1.05), ("v5e:2x2", SMALL, 23 / 16), ("v6e:2x2", SMALL, 23 / 16)]
)
def test_the_step_compiles_and_does_the_work_of_the_model(topology, size, most, capsys):
    """Without recomputation, its FLOPs are about the model's: those of all tiles that the kernels may visit. In the
    small step 16 tiles of rows are 8 experts', so 7 may be shared by two; all rows for all experts would be 8 times
    the work."""
    flags = [*SMALLER, *size]
    assert aot.main([RECIPE, "--topology", topology, "--remat", "none", *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["devices"] == 4 and report["mesh"]["fsdp"] == 4
    assert {name.split("_")[0] for name in report["kernels"]} == {"gmm", "tgmm", "splash"}
    assert not report["unknown_kernels"]
    compiled = report["products"] + sum(report["kernels"].values())
    assert 0.8 < compiled / report["model_flops"] <= most
    settings = recipe.override(recipe.load(RECIPE), flags)
    parameters = report["memory"]["parameters"]
    assert report["memory"]["optimizer state"] == pytest.approx(2 * parameters, rel=1e-2)
    assert report["moved"]["all-gather"] > parameters
    assert report["tokens"] == settings.batch_size * settings.data.seq_len / 4


@pytest.mark.aot
def test_what_does_not_fit_is_told(capsys):
    """Parameters alone of more than the chip has."""
    flags = ["--model.layers.0.pattern.1.d-ff", "65536", "--model.layers.0.repeats", "2", "--batch-size", "1"]
    assert aot.main([RECIPE, "--topology", "v5e:2x2", "--mesh.fsdp", "1", "--data.seq-len", "256", *flags]) == 1
    assert "it does not fit" in capsys.readouterr().out


@pytest.mark.aot
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v9:2x2"], "no chip 'v9'; there are v4, v5e"),
        (["--topology", "v5p"], "it must be like v5p:4x4x4"),
        (["--topology", "v5p:3x5x7"], "v5p:3x5x7"),
        (["--topology", "v5e:2x2", "--mesh.fsdp", "8"], "needs 8 devices; there are 4"),
        (["--topology", "v5p:4x8x8", "--mesh.expert", "16", "--mesh.fsdp", "16"], "Failed to find assignment"),
        (["--topology", "v5e:2x2", "--batch-size", "3", "--mesh.fsdp", "4"], "batch_size = 3 is not divisible"),
    ],
)
def test_bad_input_is_one_line(flags, message):
    with pytest.raises(InputError, match=message) as failure:
        aot.main([RECIPE, *flags])
    assert "\n" not in str(failure.value)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="libtpu is not installed: pip install 'jmoe\\[tpu\\]'"):
        aot.main([RECIPE, "--topology", "v5e:2x2"])
