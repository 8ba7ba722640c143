"""eval.py as its user runs it: its figures are the training's own, its text is the model's, and it only reads."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import jmoe
from jmoe.generate import Sampling

PROMPT = "the router gave é"
TWO_DEVICES = "--xla_force_host_platform_device_count=2"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def validation(run_dir: Path, step: int) -> dict:
    """The training's own validation after `step`."""
    records = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    (record,) = (record for record in records if (record["step"], record["split"]) == (step, "validation"))
    del record["step"], record["split"]
    return record


def flat(values: dict) -> list[float]:
    return [float(x) for name in sorted(values) for x in np.ravel(np.array(values[name], dtype=object)).tolist()]


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A finished run that may be written to."""
    return shutil.copytree(trained[0], tmp_path / "run")


def test_its_figures_are_those_of_the_training(copy, scripts):
    before, prepared = content(copy), sorted(Path(scripts.environment["JMOE_CACHE"]).glob("*/info.json"))
    code, out, err = scripts.run("eval.py", copy)
    assert (code, err) == (0, "")
    after = content(copy)
    found = json.loads(after.pop("eval.json"))
    assert after == before
    assert sorted(Path(scripts.environment["JMOE_CACHE"]).glob("*/info.json")) == prepared  # nothing tokenised again

    assert (found.pop("step"), found.pop("data")) == (24, None)
    expected = validation(copy, 24)
    assert set(found) == set(expected)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-6)
    np.testing.assert_allclose(found["perplexity"], np.exp(found["loss"]), rtol=1e-9)

    assert out.startswith(f"{copy}, step 24, {found['tokens']:,} tokens of the held-out text\n")
    assert f"\nloss           {found['loss']:.4f} nats/token (unigram entropy {found['unigram_entropy']:.4f})\n" in out
    assert f"\nperplexity     {found['perplexity']:.3f}\n" in out
    assert f"\nbits per byte  {found['bits_per_byte']:.4f}\n" in out
    assert re.search(rf"^    1 +{found['experts_per_token']:.2f} ", out, re.M)


@pytest.mark.slow
def test_an_earlier_step_where_there_is_no_cache(copy, scripts, tmp_path):
    code, _, err = scripts.run("eval.py", copy, "--step", 16, JMOE_CACHE=str(tmp_path / "cache"))
    assert code == 0, err
    found = json.loads((copy / "eval.json").read_text())
    assert found.pop("step") == 16 and found.pop("data") is None
    np.testing.assert_allclose(flat(found), flat(validation(copy, 16)), rtol=1e-6)
    assert found["loss"] > validation(copy, 24)["loss"]


@pytest.mark.slow
def test_other_text(copy, scripts, tmp_path):
    texts = ["of every expert", "é" * 70]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, out, err = scripts.run("eval.py", copy, "--data", tmp_path / "*.jsonl")
    assert code == 0, err
    found = json.loads((copy / "eval.json").read_text())
    assert found["data"] == str(tmp_path / "*.jsonl") and f"tokens of {found['data']}\n" in out
    size = sum(len(text.encode()) for text in texts)
    assert found["tokens"] == size + len(texts)  # each document's bytes, and its end
    np.testing.assert_allclose(found["bits_per_byte"], found["loss"] / np.log(2) * (size + len(texts)) / size)
    assert found["loss"] > validation(copy, 24)["loss"] + 0.5


@pytest.mark.slow
def test_a_prompt_is_continued_as_by_the_model_without_a_cache(trained, scripts):
    """Bytes rather than text: what this model writes is hardly ever UTF-8."""
    run_dir, before = trained[0], content(trained[0])
    flags = ("--prompt", PROMPT, "--max-new-tokens", 24, "--sampling.temperature", 0)
    code, out, err = scripts.run("eval.py", run_dir, *flags)
    assert (code, err) == (0, "")
    assert content(run_dir) == before
    spread = scripts.run("eval.py", run_dir, *flags, "--mesh.fsdp", -1, XLA_FLAGS=TWO_DEVICES)
    assert spread == (0, out, "")

    model, greedy = jmoe.load(run_dir), Sampling(temperature=0.0)
    assert out == PROMPT + model.generate(PROMPT, max_new_tokens=24, sampling=greedy) + "\n"
    prompt = np.concatenate([[256], model.tokenizer.encode(PROMPT)]).astype(np.int32)
    new = model.generate_tokens(prompt, max_new_tokens=24, sampling=greedy)
    assert len(new) == 24 and len(set(new.tolist())) > 1
    text = prompt
    for _ in new:
        rest = np.zeros(len(prompt) + len(new) - len(text), np.int32)  # of no effect on what stands before
        logits = model.logits(np.concatenate([text, rest])[None])
        text = np.append(text, np.argmax(logits[0, len(text) - 1]).astype(np.int32))
    assert text[len(prompt) :].tolist() == new.tolist()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("{tmp}/none", 2, "{tmp}/none is no run directory: it has no config.json"),
        ("", 2, "RUN_DIR is missing; it comes first"),
        ("{run} --promt x", 2, "unknown flag --promt; did you mean --prompt?"),
        ("{run} --batches 0", 2, "batches is 0; it must be at least 1"),
        ("{run} --data {tmp}/none/*.txt", 2, "{tmp}/none/*.txt"),
        ("{run} --mesh.data 3", 2, "needs 3 devices; there are 2"),
        ("{run} --mesh.data 2 --batch-size 3", 2, "batch_size = 3 is not divisible by accumulation * mesh data"),
        ("{run} --mesh.tensor 2", 2, "vocab dimension of 257 is not divisible by mesh tensor = 2"),
        ("{run} --prompt x --sampling.top-p 2", 2, "top_p is 2.0; it must lie in (0, 1]"),
        ("{run} --step 7", 1, "there is no such checkpoint; complete steps are [16, 20, 24]"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_told_in_one_line(trained, scripts, tmp_path, arguments, code, says):
    names = {"run": trained[0], "tmp": tmp_path}
    before = content(trained[0])
    found, _, err = scripts.run(
        "eval.py", *arguments.format(**names).split(), JAX_LOG_COMPILES="1", XLA_FLAGS=TWO_DEVICES
    )
    assert found == code
    (line,) = (line for line in err.splitlines() if not line.startswith("WARNING: Finished "))
    assert line.startswith("error: ") and says.format(**names) in line
    assert content(trained[0]) == before
