"""A run's parameters written in parts, and read whole, in parts and by Orbax."""

import dataclasses

import numpy as np
import pytest

import jmoe
from jmoe import config
from jmoe.checkpoint import CheckpointError, flatten
from jmoe.config import LayerGroup, MoE
from jmoe.convert import runs
from jmoe.convert.mapping import parameter_shapes
from jmoe.convert.runs import Run, write_run
from jmoe.data.tokenizer import byte_tokenizer
from jmoe.language_model import read_parameters
from jmoe.sharding import make_mesh
from jmoe.training import abstract_state

MODEL = config.Model(257, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, layers=(LayerGroup((MoE(3, 24),), 2),))
SETTINGS = config.Config(model=MODEL, data=config.Data(seq_len=32))
UP = "layers/0/0/feed_forward/experts/buckets/0/up"
LARGE = 4 * 16 * 16 * 2  # bytes of the query matrices


def random():
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in parameter_shapes(MODEL).items()}


def test_large_parameters_have_a_file_for_each_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_FILE", LARGE)
    values = random()

    def write(writer):
        for name, value in values.items():
            apart = 2 if "/experts/" in name else 1 if name.endswith("gain") and "layers" in name else 0
            for index in np.ndindex(value.shape[:apart]):
                writer.write(name, index, value[index])

    write_run(tmp_path / "run", SETTINGS, byte_tokenizer(), write)
    folder, run = tmp_path / "run/checkpoints/0/params", Run(tmp_path / "run")
    assert [path.name for path in sorted((folder / UP / "c").iterdir())] == ["0", "1"]
    assert [path.name for path in (folder / "layers/0/0/attention/query/c").iterdir()] == ["0"]
    loaded = flatten(jmoe.load(tmp_path / "run").params)
    for name, value in values.items():
        np.testing.assert_array_equal(run.read(name), value)
        np.testing.assert_array_equal(loaded[name], value)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(run.read(UP, index), values[UP][index])
    np.testing.assert_array_equal(run.read(UP, (1,)), values[UP][1])


@pytest.mark.parametrize("limit", [LARGE, 1 << 26])
def test_parts_have_to_be_complete_and_in_order(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(runs, "_FILE", limit)
    values = random()

    def without_the_last_expert(writer):
        for name, value in values.items():
            for index in np.ndindex(2, 3) if name == UP else [()]:
                if index != (1, 2):
                    writer.write(name, index, value[index])

    with pytest.raises(ValueError, match=r"experts/buckets/0/up/c/\d.* is not complete"):
        write_run(tmp_path / "run", SETTINGS, byte_tokenizer(), without_the_last_expert)
    for first, then in (((0, 1), (0, 1)), ((0,), (0, 0))):

        def out_of_order(writer, indices=(first, then)):
            for index in indices:
                writer.write(UP, index, values[UP][index])

        with pytest.raises(ValueError, match=r"up\[0, \d\] does not come after the \d+ bytes"):
            write_run(tmp_path / "run", SETTINGS, byte_tokenizer(), out_of_order)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(runs, "_flush", fail)
    with pytest.raises(CheckpointError, match="run could not be written: Input/output error; nothing is left there"):
        write_run(tmp_path / "run", SETTINGS, byte_tokenizer(), lambda writer: writer.write_all(random().__getitem__))
    assert list(tmp_path.iterdir()) == []


def test_devices_read_what_is_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_FILE", LARGE)
    settings = dataclasses.replace(SETTINGS, model=dataclasses.replace(MODEL, layers=(LayerGroup((MoE(4, 24),), 2),)))
    draw, shapes = np.random.default_rng(0), parameter_shapes(settings.model)
    values = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    write_run(tmp_path / "run", settings, byte_tokenizer(), lambda writer: writer.write_all(values.__getitem__))
    mesh = make_mesh(config.Mesh(fsdp=4, expert=2))
    _, params, _ = read_parameters(tmp_path / "run", abstract_state(settings, mesh).params)
    loaded = flatten(params)
    assert len(loaded[UP].sharding.device_set) == 8 and not loaded[UP].is_fully_replicated
    for name, value in values.items():
        np.testing.assert_array_equal(loaded[name], value)
