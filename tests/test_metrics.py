"""Metric lines survive kills and say what they were given; the progress display tells the right figures."""

import io
import json
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jmoe import metrics as module
from jmoe.config import InputError
from jmoe.metrics import MetricsLog, Progress, TensorBoard, last_validation, plain


def write_steps(path, start, stop, *, resume):
    log = MetricsLog(path, resume)
    for step in range(start, stop + 1):
        log.write({"step": step, "split": "train", "loss": np.float32(1) / np.float32(step + 2), "load": [[0.5, step]]})
    log.close()


def test_lines_are_json_in_the_order_given_and_flushed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", -1)
    log.write({"step": 1, "b": jnp.float32(0.1), "a": [np.arange(2), (1.5, jnp.int32(3))], "t": True, "n": None})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "b": 0.1, "a": [[0, 1], [1.5, 3]], "t": true, "n": null}\n'
    log.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.float16])
def test_floats_round_trip(dtype):
    values = np.random.default_rng(0).normal(size=500).astype(dtype)
    values[:3] = [1e-7, 0.1, 3]
    again = np.asarray(json.loads(json.dumps(plain(values)))).astype(dtype)
    assert again.tobytes() == values.tobytes()
    assert plain(jnp.asarray(values[5], jnp.float32)) == float(str(np.float32(values[5])))


def test_what_is_not_finite_is_a_string_that_float_reads():
    written = plain({"a": float("nan"), "b": np.float32("inf"), "c": jnp.array([-jnp.inf, jnp.nan, 1.0])})
    assert written == {"a": "NaN", "b": "Infinity", "c": ["-Infinity", "NaN", 1.0]}
    assert math.isnan(float(written["a"])) and float(written["c"][0]) == -math.inf


def test_the_last_validation_is_read_as_it_was_given(tmp_path):
    log, inf, nan = MetricsLog(tmp_path / "metrics.jsonl", -1), math.inf, math.nan
    log.write({"step": 1, "split": "validation", "loss": 1.0})
    record = {"step": 2, "split": "validation", "loss": nan, "bits_per_byte": -inf, "tokens": 7, "load": [[inf, 0.5]]}
    log.write(record | {"note": "nan", "none": None})
    log.write({"step": 3, "split": "train", "loss": 3.0})
    log.close()
    read = last_validation(tmp_path / "metrics.jsonl")
    assert math.isnan(read.pop("loss")) and type(read["tokens"]) is int
    del record["loss"]
    assert read == record | {"note": "nan", "none": None}


def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write_steps(whole, 1, 30, resume=-1)
    write_steps(resumed, 1, 17, resume=-1)
    with resumed.open("ab") as stream:  # killed in the middle of a line
        stream.write(b'{"step": 18, "los')
    write_steps(resumed, 11, 30, resume=10)
    assert resumed.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "resumed.jsonl"}


def test_a_line_without_its_end_is_torn_even_if_it_is_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    MetricsLog(path, 5).close()
    assert path.read_text() == '{"step": 1}\n'


def test_a_new_run_begins_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, 3, resume=-1)
    MetricsLog(path, -1).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}', '{"step": "x"}'])
def test_a_damaged_line_within_is_told(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2, is not a record"):
        MetricsLog(path, 5)
    assert path.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------- TensorBoard


def events(directory) -> list[Event]:
    found = []
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, event, its checksum
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_tags_and_purge(tmp_path):
    board = TensorBoard(tmp_path, 7)
    by_layer = {"a_by_layer": [2.0, np.float32(3.0)], "p_by_layer": [None, 0.5], "z_by_layer": [1.0, np.float32("inf")]}
    record = {"step": 8, "split": "train", "loss": 1.5, "z": float("nan"), "moe_layers": [1, 3]}
    board.write(record | by_layer | {"load_by_layer": [[0.5, 0.5], [0.25, 0.5, 0.25]]})
    board.write({"step": 8, "split": "validation", "loss": 2.5})
    board.close()
    values = [(event.step, value) for event in events(tmp_path) for value in event.summary.value]
    scalars = {value.tag: (step, value.simple_value) for step, value in values if not value.HasField("histo")}
    assert scalars == {
        "loss": (8, 1.5),
        "a/layer_1": (8, 2.0),
        "a/layer_3": (8, 3.0),
        "p/layer_3": (8, 0.5),
        "z/layer_1": (8, 1.0),
        "validation/loss": (8, 2.5),
    }
    histograms = {value.tag: (step, value.histo) for step, value in values if value.HasField("histo")}
    assert set(histograms) == {"load/layer_1", "load/layer_3"}
    step, histogram = histograms["load/layer_3"]
    assert step == 8 and list(histogram.bucket_limit) == [0.5, 1.5, 2.5] and list(histogram.bucket) == [0.25, 0.5, 0.25]
    assert (histogram.min, histogram.max, histogram.num) == (-0.5, 2.5, 1)
    assert (histogram.sum, histogram.sum_squares) == (1.0, 1.5)
    starts = [event.step for event in events(tmp_path) if event.session_log.status == 1]
    assert starts == [8]


# ------------------------------------------------------------------------------------------------------------- progress

METRICS = {"loss": 3.14159, "learning_rate": 0.003, "experts_per_token": 2.5}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def output(monkeypatch):
    """Puts a stream in place of standard output."""

    def replace(stream):
        monkeypatch.setattr("sys.stdout", stream)
        return stream

    return replace


def run(progress, clock):
    clock.now += 60.0  # compiling
    progress.update(1, METRICS)
    for step in range(2, 21):
        clock.now += 0.5
        progress.update(step, METRICS if step % 10 == 0 else None)
    progress.write("saved")
    progress.close()


def test_plain_lines_where_there_is_no_terminal(clock, output):
    stream = output(io.StringIO())
    run(Progress(300, 0, 1000), clock)
    assert stream.getvalue().splitlines() == [
        "step   1/300  loss 3.1416  lr 3.00e-03   2.50 experts/token          - tokens/s        ? left",
        "step  10/300  loss 3.1416  lr 3.00e-03   2.50 experts/token      2,000 tokens/s    02:25 left",
        "step  20/300  loss 3.1416  lr 3.00e-03   2.50 experts/token      2,000 tokens/s    02:20 left",
        "saved",
    ]


def test_a_bar_on_a_terminal(clock, output):
    stream = output(Terminal())
    run(Progress(300, 0, 1000), clock)
    last = stream.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert "20/300" in last and "loss 3.1416" in last and "2,000 tokens/s" in last and "02:20 left]" in last
    assert "saved\n" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_skipped_step_says_so(clock, output, stream):
    shown = output(stream())
    progress = Progress(40, 20, 10)
    progress.update(21, {"loss": math.nan, "skipped": 1})
    at = shown.tell()
    clock.now += 1.0
    progress.update(22, {"loss": 1.0, "skipped": 0})
    text = shown.getvalue()
    progress.close()
    assert "loss nan " in text[:at] and "  skipped: gradients not finite" in text[:at]
    assert "loss 1.0000 " in text[at:] and "skipped" not in text[at:]


def test_drops_are_told_where_there_are_some(clock, output):
    stream = output(io.StringIO())
    progress = Progress(40, 20, 10)
    progress.update(21, METRICS | {"dropped_per_token": 0.0})
    clock.now += 1.0
    progress.update(22, METRICS | {"dropped_per_token": 0.0123})
    first, second = stream.getvalue().splitlines()
    assert "dropped" not in first and "  2.50 experts/token  0.012 dropped/token  " in second


def test_a_dense_model_and_a_resumed_run(clock, output):
    stream = output(io.StringIO())
    progress = Progress(40, 20, 10)
    progress.update(21, {"loss": 1.0})
    assert stream.getvalue() == "step 21/40  loss 1.0000          - tokens/s        ? left\n"


def test_tags_of_values_of_all_layers_and_of_moe_layers_alone():
    record = {
        "moe_layers": [1, 3],
        "load_cv_by_layer": [0.5, 0.25],
        "max_attention_logit_by_layer": [1.0, 2.0, 3.0, 4.0],
    }
    tags = module._by_tag(record)
    assert tags["load_cv/layer_3"] == 0.25 and tags["max_attention_logit/layer_2"] == 3.0
    del record["moe_layers"], record["load_cv_by_layer"]
    assert len(module._by_tag(record)) == 4
