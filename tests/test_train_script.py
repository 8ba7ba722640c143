"""train.py as its user runs it: what a run leaves, exact resume, damaged checkpoints, and what it refuses."""

import importlib.util
import json
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from jmoe import recipe, training
from jmoe.checkpoint import Checkpoints
from jmoe.config import InputError
from jmoe.data.tokenizer import Tokenizer
from jmoe.run_directory import RunDirectory

STEPS = 24
ROUTING = {
    *("experts_per_token", "experts_per_token_by_layer", "experts_per_token_histogram_by_layer", "moe_layers"),
    *("load_by_layer", "load_cv_by_layer", "load_max_over_mean_by_layer", "dead_experts_by_layer"),
    *("router_entropy_by_layer", "nucleus_p_by_layer", "dropped_per_token", "dropped_per_token_by_layer"),
    *("activated_expert_parameters_by_layer", "activated_parameters", "parameters"),
    *("activated_flops_per_token", "flops_per_token"),
}
TRAIN = {
    *("step", "split", "loss", "cross_entropy", "z_loss", "load_balance_loss", "sequence_balance_loss"),
    *("router_z_loss", "dynamic_loss", "parameter_penalty"),
    *("grad_norm", "learning_rate", "skipped", "skipped_total", "skipped_in_a_row"),
} | ROUTING
VALIDATION = {"step", "split", "loss", "perplexity", "bits_per_byte", "unigram_entropy", "tokens"} | ROUTING


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def saved_steps(run_dir: Path) -> list[int]:
    return Checkpoints(run_dir / "checkpoints", keep=1).steps()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A finished run that may be written to."""
    return shutil.copytree(trained[0], tmp_path / "run")


def wait_for(condition, process, seconds=120.0) -> None:
    """Returns when `condition()` holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ------------------------------------------------------------------------------------------------------ what a run does


def test_a_run_leaves_all_that_the_readme_names(trained, scripts):
    run_dir, _, err = trained
    names = {"config.json", "metrics.jsonl", "timing.jsonl", "tensorboard", "checkpoints", "routing.png"}
    assert {path.name for path in run_dir.iterdir()} == names | {"tokenizer.json", "lock"}

    config = recipe.from_dict(json.loads((run_dir / "config.json").read_text()))
    assert config == recipe.parse([str(scripts.recipe), "--run-dir", str(run_dir)], config.mesh, default="")[1]
    assert Tokenizer.from_file(run_dir / "tokenizer.json").encode("aé").tolist() == [97, 195, 169]
    assert saved_steps(run_dir) == [16, 20, 24]

    picture = imread(run_dir / "routing.png")
    assert picture.shape[1] == 1400 and picture.shape[2] == 4 and len(np.unique(picture[..., :3])) > 50
    events = b"".join(path.read_bytes() for path in (run_dir / "tensorboard").iterdir())
    for tag in (
        b"loss",
        b"validation/bits_per_byte",
        b"experts_per_token/layer_1",
        b"load_cv/layer_1",
        b"load/layer_1",
    ):
        assert tag in events

    assert [line.split(":")[0] for line in err.splitlines()] == ["tokenising train", "tokenising validation"]


def test_metrics_are_json_lines_without_wall_clock(trained):
    records = metrics(trained[0])
    train = [record for record in records if record["split"] == "train"]
    validation = [record for record in records if record["split"] == "validation"]
    assert [record["step"] for record in train] == [*range(1, STEPS + 1)]
    assert [record["step"] for record in validation] == [8, 16, 24]
    assert all(set(record) == TRAIN for record in train)
    assert all(set(record) == VALIDATION for record in validation)
    assert records == sorted(records, key=lambda record: (record["step"], record["split"]))
    for record in records:
        (shares,), (experts,) = (record[f"experts_per_token{name}_by_layer"] for name in ("_histogram", ""))
        np.testing.assert_allclose(experts, np.arange(len(shares)) @ shares, rtol=1e-5)
        assert record["activated_expert_parameters_by_layer"] == pytest.approx([experts * 3 * 16 * 16], rel=1e-6)
        idle = record["parameters"] - record["activated_parameters"]
        assert idle == pytest.approx((8 - experts) * 3 * 16 * 16, abs=0.01)
        assert record["flops_per_token"] - record["activated_flops_per_token"] == pytest.approx(6 * idle, abs=0.1)
    assert train[-1]["loss"] < 0.7 * train[0]["loss"]
    assert validation[-1]["loss"] < validation[-1]["unigram_entropy"]
    np.testing.assert_allclose(
        [record["learning_rate"] for record in train[:5]], [2e-3, 4e-3, 6e-3, 8e-3, 1e-2], rtol=1e-6
    )
    timing = [json.loads(line) for line in (trained[0] / "timing.jsonl").read_text().splitlines()]
    assert timing and all(set(record) == {"step", "seconds", "tokens_per_second"} for record in timing)


def test_the_final_report(trained):
    run_dir, out, _ = trained
    last = metrics(run_dir)[-1]
    progress, report = out.split(f"\nrun directory    {run_dir}\n")
    assert "\r" not in progress and "\x1b" not in progress  # no terminal: no bar, no colours
    assert progress.startswith(f"run directory {run_dir}, 0 of {STEPS} steps taken\nmodel: 2 layers, ")
    assert re.search(
        r"^step  7/24  loss \d\.\d{4}  lr 1\.00e-02   \d\.\d\d experts/token +[\d,]+ tokens/s +\d\d:\d\d left$",
        progress,
        re.M,
    )
    assert f"validation loss  {last['loss']:.4f} nats/token (unigram entropy {last['unigram_entropy']:.4f})" in report
    assert f"{last['bits_per_byte']:.4f} bits/byte, over {last['tokens']:,} tokens" in report
    assert re.search(r"^speed            [\d,]+ tokens/s$", report, re.M)
    assert re.search(rf"^    1 +{last['experts_per_token']:.2f} ", report, re.M)
    activated = f"a token activates {last['activated_parameters']:,.0f} of {last['parameters']:,} parameters and "
    assert f"\n{activated}" in report
    assert len(report.split("a sample:\n\n")[1].encode()) > 20


def test_shardings_are_printed_and_nothing_else_is_done(scripts, tmp_path):
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    flags = ("--print-sharding", "--mesh.data", 2, "--mesh.fsdp")
    code, out, err = scripts.train(tmp_path / "run", *flags, 4, **eight)
    assert (code, err) == (0, "")
    assert re.search(r"^embedding +257, 16 +vocab, embed +-, fsdp 4 +4,112$", out, re.M)
    code, out, err = scripts.train(tmp_path / "run", *flags, 3, "--mesh.data", 1, **eight)
    assert code == 2 and re.search(r"^embedding +257, 16 +vocab, embed +-, fsdp 3 ! +6,168$", out, re.M)
    message = r"dimension of \d+ is not divisible by mesh fsdp = 3; train.py --print-sharding shows"
    assert re.fullmatch(rf"error: .* {message} .*\n", err)
    assert not (tmp_path / "run").exists()


def test_the_optimiser_is_printed_and_nothing_else_is_done(scripts, tmp_path):
    code, out, err = scripts.train(tmp_path / "run", "--print-optimizer", "--optim", "Muon")
    assert (code, err) == (0, "")
    assert re.search(r"^embedding +embedding +AdamW +257, 16 +- +x 1 +0.1 +1$", out, re.M)
    assert re.search(r"buckets.0.down +experts +Muon +1, 8, 16, 16 +8 x \(16, 16\) +x 1 +0.1 +0.8$", out, re.M)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_finished_run_is_reported_again_and_left_alone(copy, scripts):
    before = content(copy)
    code, out, err = scripts.train(copy)
    assert (code, err) == (0, "")
    assert f"{STEPS} of {STEPS} steps taken" in out and "validation loss  " in out and "a sample:" in out
    after = content(copy)
    kept = {name for name in before if not name.startswith("tensorboard/") and name not in ("lock", "config.json")}
    assert {name for name in after if not name.startswith("tensorboard/")} == kept | {"lock", "config.json"}
    assert all(after[name] == before[name] for name in kept)


# --------------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_never_was(scripts, trained, tmp_path):
    """Kills at random steps and times, and two that aim at the two stretches of a save: before and after Orbax's
    rename."""
    run_dir, generator = tmp_path / "run", random.Random(0)
    checkpoints = run_dir / "checkpoints"
    command = ("train.py", scripts.recipe, "--run-dir", run_dir, "--checkpoint.every", 1)

    def writing():
        return any(checkpoints.glob("*.orbax-checkpoint-tmp*"))

    def without_manifest():
        steps = [path for path in checkpoints.glob("*") if path.name.isdecimal()]
        return any(not (path / "manifest.json").exists() for path in steps)

    def after(count, seconds):
        reached = []

        def condition():
            if not reached and lines(run_dir) >= count:
                reached.append(time.monotonic())
            return reached and time.monotonic() >= reached[0] + seconds

        return condition

    # The metrics hold a line a step.
    moments = [after(count, generator.uniform(0.0, 0.15)) for count in sorted(generator.sample(range(1, 18), 4))]
    landed, in_save = 0, 0
    for moment in (after(0, generator.uniform(0.1, 0.8)), *moments[:2], writing, *moments[2:], without_manifest):
        with scripts.start(*command) as process:
            wait_for(lambda: lines(run_dir) > 0 or (run_dir / "lock").exists(), process)
            wait_for(moment, process)
            process.kill()
            _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err.decode()
        landed += process.returncode != 0
        cut = [name for name, found in (("written", writing()), ("sealed", without_manifest())) if found]
        in_save += process.returncode != 0 and bool(cut)
        print(f"killed at line {lines(run_dir)}, complete: {saved_steps(run_dir)}, being {cut or 'nothing'}")
    assert landed >= 5 and in_save >= 1

    code, _, err = scripts.run(*command)
    assert code == 0, err
    assert "damaged" not in err
    scripts.assert_same_run(run_dir, trained[0])


@pytest.mark.slow
def test_signals_save_and_stop_with_a_code_of_their_own(scripts, trained, tmp_path):
    run_dir = tmp_path / "run"
    stops = []
    for number, count in ((signal.SIGTERM, 3), (signal.SIGINT, 12)):
        with scripts.start("train.py", scripts.recipe, "--run-dir", run_dir, "--checkpoint.every", 1000) as process:
            wait_for(lambda: lines(run_dir) >= count, process)  # noqa: B023
            process.send_signal(number)
            out, err = process.communicate()
        assert process.returncode == 75, err.decode()
        stops.append(int(re.search(r"step (\d+) is saved, the same command goes on\n$", out.decode())[1]))  # type: ignore
        assert saved_steps(run_dir) == stops
    assert 3 <= stops[0] < stops[1] < STEPS
    code, out, err = scripts.train(run_dir)
    assert code == 0, err
    assert f"{stops[1]} of {STEPS} steps taken" in out
    scripts.assert_same_run(run_dir, trained[0])


@pytest.mark.slow
def test_more_steps_and_other_workers_go_on_exactly(scripts, trained, tmp_path):
    """Under a constant schedule a run that is extended is the longer run."""
    code, _, err = scripts.train(tmp_path / "run", "--steps", 16)
    assert code == 0, err
    code, _, err = scripts.train(tmp_path / "run", "--data.workers", 3)
    assert code == 0, err
    scripts.assert_same_run(tmp_path / "run", trained[0])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("--mesh.data", 4), ("--mesh.fsdp", 2, "--mesh.data", 2)], ids=["data", "fsdp"])
def test_begun_on_four_devices_and_ended_on_one_it_learns_the_same(scripts, trained, tmp_path, mesh):
    """Devices add up in another order: parameters were found to differ by 2e-6, and where a gradient is so small that
    Adam's division magnifies its rounding, by 1e-5."""
    run_dir = tmp_path / "run"
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    code, out, err = scripts.train(run_dir, "--steps", 16, *mesh, **four)
    assert code == 0, err
    assert len(out.split("a sample:\n\n")[1].encode()) > 20 and saved_steps(run_dir) == [8, 12, 16]
    code, out, err = scripts.train(run_dir)
    assert (code, err) == (0, "")
    assert out.startswith(f"run directory {run_dir}, 16 of {STEPS} steps taken\n") and "a sample:" in out

    found, expected = metrics(run_dir), metrics(trained[0])
    for key in ("step", "split"):
        assert [record[key] for record in found] == [record[key] for record in expected]
    for key in ("loss", "experts_per_token"):
        values = ([record[key] for record in records] for records in (found, expected))
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=key)
    state, reference = (scripts.saved_state(path) for path in (run_dir, trained[0]))
    assert state["data/step"] == reference["data/step"] and state.keys() == reference.keys()
    for name in (name for name in state if name.startswith("params/")):
        arrays = (np.frombuffer(content, dtype) for dtype, _, content in (state[name], reference[name]))
        np.testing.assert_allclose(*arrays, rtol=1e-4, atol=3e-5, err_msg=name)


# -------------------------------------------------------------------------------------------------- damaged checkpoints


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step: Path) -> str:
    file = largest(step / "params")
    file.write_bytes(file.read_bytes()[:-7])
    return f"{file.relative_to(step)} has {file.stat().st_size} bytes, {file.stat().st_size + 7} were written"


def flip_a_bit(step: Path) -> str:
    file = largest(step / "optimizer")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    return f"{file.relative_to(step)} has other content than was written"


def empty(step: Path) -> str:
    shutil.rmtree(step)
    step.mkdir()
    return "manifest.json is missing"


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_used(copy, scripts, trained, damage):
    reason = damage(copy / "checkpoints" / "24")
    code, out, err = scripts.train(copy)
    assert code == 0, err
    assert f"WARNING: the checkpoint of step 24 in {copy}/checkpoints is damaged: {reason}\n" in err
    assert "20 of 24 steps taken" in out
    scripts.assert_same_run(copy, trained[0])


@pytest.mark.slow
def test_where_no_checkpoint_is_good_it_refuses_and_touches_nothing(copy, scripts):
    reasons = [damage(copy / "checkpoints" / step) for damage, step in ((truncate, "16"), (flip_a_bit, "20"))]
    reasons.append(empty(copy / "checkpoints" / "24"))
    before = content(copy)
    code, out, err = scripts.train(copy)
    assert (code, out) == (1, "")
    *warnings, error = err.splitlines()
    assert all(line.startswith("WARNING: ") for line in warnings) and len(warnings) == 3
    assert error.startswith(f"error: none of the checkpoints in {copy}/checkpoints is good, and no run starts over: ")
    assert all(reason in error for reason in reasons)
    assert {**content(copy), "lock": b""} == {**before, "lock": b""}


# -------------------------------------------------------------------------------------------------------- skipped steps


@pytest.mark.slow
def test_gradients_that_are_not_finite_stop_it_after_so_many(scripts, tmp_path):
    """The first step of such a learning rate leaves parameters whose gradients overflow."""
    run_dir = tmp_path / "run"
    absurd = ("--optim.learning-rate", 1e30, "--optim.schedule.warmup-steps", 0)
    code, out, err = scripts.train(run_dir, *absurd, "--max-skipped", 3, "--checkpoint.every", 1)
    assert code == 1
    assert err == (
        "error: step 4: the gradients of 3 steps in a row were not finite (max_skipped = 3); "
        f"the last good checkpoint is that of step 3 in {run_dir}/checkpoints\n"
    )
    assert [(r["skipped"], r["skipped_in_a_row"]) for r in metrics(run_dir)] == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert re.findall(r"^step +(\d+)/24 .* left  skipped: gradients not finite$", out, re.M) == ["2", "3", "4"]
    first, second, third = (scripts.saved_state(run_dir, step) for step in (1, 2, 3))
    for name in first:
        if name.startswith(("params/", "optimizer/")):
            assert first[name] == second[name] == third[name], name
    assert first["data/step"] != second["data/step"] and "a sample" not in out


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(result: tuple[int, str, str]) -> str:
    """The one line of a refusal. JAX logs what it compiles, so that one line also means: nothing."""
    code, _, err = result
    assert code == 2, err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_an_unknown_flag(scripts, tmp_path):
    line = refused(scripts.train(tmp_path / "run", "--optim.learning-rat", 1e-3, JAX_LOG_COMPILES="1"))
    assert line == "unknown flag --optim.learning-rat; did you mean --optim.learning-rate?"
    assert not (tmp_path / "run").exists()


def test_a_run_directory_in_use_by_another_process(scripts, trained):
    with RunDirectory.open(trained[0]) as run:
        line = refused(scripts.train(run.path, JAX_LOG_COMPILES="1"))
    assert line.startswith(f"run directory {run.path} is in use by process ")


@pytest.mark.slow
def test_a_damaged_record_is_named_and_can_be_mended(scripts, trained, tmp_path):
    cache = shutil.copytree(scripts.environment["JMOE_CACHE"], tmp_path / "cache")
    word = b"\x00r\x00o\x00u\x00t\x00e\x00r"  # token ids are 16 bits wide
    files = {file: bytearray(file.read_bytes()) for file in cache.glob("*/00000.array_record")}
    for file, data in files.items():
        if word in data:  # other tests of the session prepare other texts
            data[data.index(word) + 1] ^= 1
            file.write_bytes(data)
    code, _, err = scripts.train(tmp_path / "run", JMOE_CACHE=str(cache))
    assert code == 2
    (line,) = err.splitlines()
    found = re.match(r"error: (\S+)/00000.array_record: record (\d+) is damaged \(.*\); delete \1 and the next", line)
    assert found and Path(found[1]).parent == cache, line
    for folder in {file.parent for file in cache.glob("*/00000.array_record")}:
        shutil.rmtree(folder)
    code, _, err = scripts.train(tmp_path / "run", JMOE_CACHE=str(cache))
    assert code == 0, err
    scripts.assert_same_run(tmp_path / "run", trained[0])


@pytest.fixture
def main(scripts, monkeypatch):
    """train.py's main on the recipe, where nothing may be compiled."""
    specification = importlib.util.spec_from_file_location("train_script", scripts.root / "train.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "train_script", module)
    specification.loader.exec_module(module)
    for name in ("create_state", "make_train_step", "make_eval_step"):
        monkeypatch.setattr(training, name, lambda *_: pytest.fail("went on to the first compile"))
    return lambda *flags: module.main([str(scripts.recipe), *map(str, flags)])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--steps many", "--steps is 'many'; it must be an integer"),
        ("--model.layers.0.pattern.1.router TopK --model.layers.0.pattern.1.router.k 9", "router.k is 9; it must be "),
        ("--model.layers.0.pattern.1.router.p 0", "router.p is 0.0; a probability threshold must lie in (0, 1]"),
        ("--model.layers.0.pattern.1.router.p 1.5", "router.p is 1.5; a probability threshold must lie in (0, 1]"),
        ("--model.num-heads 3 --model.num-kv-heads 2", "model.num_heads = 3 is not divisible by model.num_kv_heads"),
        ("--accumulation 3", "batch_size = 4 is not divisible by accumulation = 3"),
        ("--mesh.data 8", "batch_size = 4 is not divisible by accumulation * mesh data*fsdp*expert = 1 * 8"),
        ("--mesh.data 2 --mesh.fsdp 2 --accumulation 2", "accumulation * mesh data*fsdp*expert = 2 * 4"),
        ("--mesh.data 99", "needs 99 devices; there are 8"),
        ("--mesh.expert 2 --transport RaggedAllToAll", "transport is RaggedAllToAll, which CPUs lack; AllToAll"),
        ("--transport.capacity 0", "transport.capacity is 0.0; it must be positive, or None"),
        ("--mesh.tensor 5", "dimension of 257 is not divisible by mesh tensor = 5"),
        ("--steps 3", "optim.schedule.warmup_steps = 4 is more than steps = 3"),
        ("--model.vocab-size 256", "model.vocab_size = 256 is too small: the tokenizer has 257 ids"),
        ("--data.sources.0.glob {folder}/none/*.txt", "{folder}/none/*.txt"),
        ("--data.sources.0.glob {folder}/empty.txt", "{folder}/empty.txt has no document with text for the train"),
        ("--data.sources.0.glob {folder}/blank.jsonl", "{folder}/blank.jsonl has no document with text for the train"),
        ("--data.validation-fraction 1e-9", "has no document with text for the validation split; the share held out"),
        ("--data.sources.0 TFDS --data.sources.0.name {folder}/none", "{folder}/none"),
        ("--data.tokenizer TokenizerFile --data.tokenizer.path {folder}/none.json", "{folder}/none.json"),
        ("--data.cache-dir {folder}/empty.txt/cache", "empty.txt/cache' cannot be written: Not a directory"),
        ("--run-dir {folder}/empty.txt/run", "{folder}/empty.txt/run cannot be written to: Not a directory"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_any_compile(main, tmp_path, capfd, flags, says):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": " \\n"}\n' * 20)
    given = flags.format(folder=tmp_path).split()
    with pytest.raises(InputError) as caught:
        main("--run-dir", tmp_path / "run", *given)
    assert says.format(folder=tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""  # a run that begins names its directory
    assert not list(tmp_path.glob("run/[!l]*"))  # a lock, at most


# ---------------------------------------------------------------------------------------------- what may change and not


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--model.d-model 24", "  model.d_model: run has 16, command says 24"),
        ("--model.layers.0.pattern.0 MoE", '  model.layers.0.pattern.0.kind: run has "Dense", command says "MoE"'),
        ("--data.seq-len 64", "  data.seq_len: run has 32, command says 64"),
        ("--data.tokenizer BPE", '  data.tokenizer.kind: run has "Bytes", command says "BPE"'),
        ("--batch-size 8", "  batch_size: run has 4, command says 8"),
        ("--optim.learning-rate 5e-3", "  optim.learning_rate: run has 0.01, command says 0.005"),
    ],
)
def test_another_run_is_refused_with_the_difference(main, trained, flags, says):
    before = content(trained[0])
    with pytest.raises(InputError) as caught:
        main("--run-dir", trained[0], *flags.split())
    first, second = str(caught.value).splitlines()
    assert "cannot go on with the run in its directory; give " in first and second == says
    assert ("--allow-learning-rate-change" in first) == ("learning-rate" in flags)
    assert {**content(trained[0]), "lock": b""} == {**before, "lock": b""}


def test_fewer_steps_than_were_taken_are_refused(main, trained):
    with pytest.raises(InputError, match=r"has taken 24 steps; --steps 10 is too few"):
        main("--run-dir", trained[0], "--steps", 10)
    assert json.loads((trained[0] / "config.json").read_text())["steps"] == STEPS


def test_other_text_under_the_same_name_is_refused(main, trained, scripts):
    extra = scripts.text / "99.txt"
    extra.write_text("a text that was not there before")
    try:
        with pytest.raises(InputError, match=r"not what the run was trained on:\n  train source 0: run has"):
            main("--run-dir", trained[0])
    finally:
        extra.unlink()


@pytest.mark.slow
def test_steps_and_logging_may_change_and_the_learning_rate_with_its_flag(copy, scripts):
    changes = ("--steps", 28, "--log-every", 2, "--optim.learning-rate", 5e-3)
    code, _, err = scripts.train(copy, *changes, "--allow-learning-rate-change")
    assert code == 0, err
    new = [record for record in metrics(copy)[STEPS + 3 :] if record["split"] == "train"]
    assert [record["step"] for record in new] == [26, 28]
    np.testing.assert_allclose([record["learning_rate"] for record in new], 5e-3)
    assert json.loads((copy / "config.json").read_text())["optim"]["learning_rate"] == 5e-3


def test_a_new_run_begins_with_the_parameters_of_another(scripts, trained, tmp_path):
    earlier, new = trained[0], tmp_path / "new"
    flags = ("--run-dir", new, "--init-from", earlier, "--steps", 4)
    code, _, err = scripts.run("train.py", earlier / "config.json", *flags)
    assert code == 0, err
    losses = [record["loss"] for record in metrics(earlier) if record["split"] == "train"]
    assert metrics(new)[0]["step"] == 1 and metrics(new)[0]["loss"] < (losses[0] + losses[-1]) / 2
    code, _, err = scripts.run("train.py", new / "config.json", "--init-from", tmp_path / "gone", "--run-dir", new)
    assert code == 0, err  # a run that goes on needs it no more
