"""The mesh: how parameters are split over it, what cannot be split, and which host loads which rows."""

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
import pytest

from jmoe import config, sharding, training
from jmoe.config import InputError

MODEL = config.Model(
    vocab_size=136,
    d_model=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    tie_embeddings=False,
    layers=(config.LayerGroup((config.MoE(6, 56, config.TopK(2, bias_rate=0.01)), config.Dense(88)), repeats=3),),
)
SETTINGS = config.Config(model=MODEL, mesh=config.Mesh(fsdp=2, expert=2, tensor=2))


@dataclass(frozen=True)
class Device:
    """Of a host."""

    id: int
    process_index: int
    platform: str = "none"
    device_kind: str = "none"


def hosts_of(*process_indices):
    return [Device(id, process) for id, process in enumerate(process_indices)]


@cache
def mesh_and_shapes():
    mesh = sharding.make_mesh(SETTINGS.mesh)
    return mesh, training.abstract_state(SETTINGS, mesh)


def variables(state):
    leaves = jax.tree.leaves((state.params, state.opt_state), is_leaf=sharding.is_variable)
    return [leaf for leaf in leaves if sharding.is_variable(leaf)]


def test_everything_is_created_where_it_lies_and_never_whole_on_one_device(devices):
    """Parameters, the optimiser's moments and router biases. A device's program of their creation holds no array of
    the shape of anything that is to be split."""
    mesh, shapes = mesh_and_shapes()
    init = training.make_init(SETTINGS, mesh)
    with jax.set_mesh(mesh):
        program = init.jitted.lower().compile()
    text = program.as_text()
    split = 0
    for variable in variables(shapes):
        share = variable.sharding.shard_shape(variable.shape)
        assert ("[" + ",".join(map(str, share)) + "]") in text
        if share != variable.shape and len(share) > 1:
            split += 1
            assert ("[" + ",".join(map(str, variable.shape)) + "]") not in text, sharding.logical_axes(variable)
    assert split > 40
    whole, largest = (f(math.prod(v.shape) * 4 for v in variables(shapes)) for f in (sum, max))
    memory = program.memory_analysis()
    assert memory.output_size_in_bytes < whole / 2 and memory.temp_size_in_bytes < 2 * largest

    state = init()
    for variable, shape in zip(variables(state), variables(shapes), strict=True):
        expected = jax.sharding.NamedSharding(mesh, sharding.spec(*sharding.logical_axes(variable)))
        assert variable[...].sharding.is_equivalent_to(expected, len(shape.shape))
    bias = state.params.layers[0][0].feed_forward.router.bias
    assert bias.shape == (3, 6)


def test_the_table_tells_how_each_parameter_is_split(devices):
    mesh, shapes = mesh_and_shapes()
    first, *lines, last = sharding.sharding_table(shapes.params, mesh).splitlines()
    assert re.split(r"  +", first) == ["parameter", "shape", "logical axes", "mesh axes", "bytes/device"]
    rows = {path: rest for path, *rest in (re.split(r"  +", line) for line in lines)}
    assert rows["layers.0.0.feed_forward.experts.buckets.0.gate"] == [
        "3, 6, 40, 56",
        "layers, expert, embed, expert_mlp",
        "-, expert 2, fsdp 2, tensor 2",
        f"{3 * 3 * 20 * 28 * 4:,}",
    ]
    assert rows["layers.0.0.feed_forward.router.bias"] == ["3, 6", "layers, router", "-, -", "72"]
    held = sum(math.prod(v.sharding.shard_shape(v.shape)) * 4 for v in jax.tree.leaves(shapes.params))
    whole = sum(v.size * 4 for v in jax.tree.leaves(shapes.params))
    assert last == f"mesh data 1 x fsdp 2 x expert 2 x tensor 2: {held:,} bytes on each device, of {whole:,}"


@pytest.mark.parametrize(
    "mesh, model, message",
    [
        (config.Mesh(tensor=4), {}, "its kv_heads dimension of 2 is not divisible by mesh tensor = 4"),
        (config.Mesh(fsdp=3), {}, "embedding: its embed dimension of 40 is not divisible by mesh fsdp = 3"),
        (config.Mesh(tensor=2), {"vocab_size": 135}, "its vocab dimension of 135 is not divisible by mesh tensor = 2"),
        (config.Mesh(expert=4), {}, "its expert dimension of 6 is not divisible by mesh expert = 4"),
    ],
    ids=str,
)
def test_a_dimension_that_cannot_be_split_is_named(devices, mesh, model, message):
    settings = dataclasses.replace(SETTINGS, mesh=mesh, model=dataclasses.replace(MODEL, **model))
    on = sharding.make_mesh(mesh)
    shapes = training.abstract_state(settings, on).params
    with pytest.raises(InputError, match=f"{message}; train.py --print-sharding shows how every parameter is split$"):
        sharding.check_divisible(shapes, on)
    size, parts = (int(number) for number in re.findall(r"\d+", message))
    marked = [line for line in sharding.sharding_table(shapes, on).splitlines() if " !" in line]
    assert marked and all(str(size) in line and f" {parts} !" in line for line in marked)


def test_a_batch_that_cannot_be_split_is_refused(devices):
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    sharding.check_batch(16, 4, mesh)
    with pytest.raises(InputError, match=r"batch_size = 24 is not divisible by accumulation \* mesh .* = 4 \* 4"):
        sharding.check_batch(24, 4, mesh)


@pytest.mark.parametrize(
    "mesh, shares",
    [
        (config.Mesh(data=8), [(0, 2), (1, 2)]),
        (config.Mesh(fsdp=4, expert=2), [(0, 2), (1, 2)]),
        (config.Mesh(data=2, tensor=4), [(0, 2), (1, 2)]),
        (config.Mesh(tensor=8), [(0, 1), (0, 1)]),  # both hosts need every row
    ],
    ids=str,
)
def test_each_host_loads_its_share(monkeypatch, mesh, shares):
    on = sharding.make_mesh(mesh, hosts_of(0, 0, 0, 0, 1, 1, 1, 1))
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda: process)  # noqa: B023
        assert sharding.host_share(on) == share


def test_hosts_whose_devices_lie_apart(monkeypatch):
    """Shares are numbered by their first rows; rows that two hosts share in part are refused."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    devices = np.array(hosts_of(1, 0, 1, 0, 1, 0, 1, 0)).reshape(2, 2, 2, 1)
    assert sharding.host_share(jax.sharding.Mesh(devices, sharding.MESH_AXES)) == (0, 2)
    devices = np.array(hosts_of(0, 0, 0, 1, 1, 1, 1, 0)).reshape(2, 2, 1, 2)
    with pytest.raises(InputError, match="hosts share some of their rows; make tensor fit into a host"):
        sharding.host_share(jax.sharding.Mesh(devices, sharding.MESH_AXES))


def test_a_mesh_leaves_no_host_out():
    devices = hosts_of(0, 0, 1, 1)
    with pytest.raises(InputError, match="needs 2 of 4 devices, and only 1 of 2 processes have those"):
        sharding.make_mesh(config.Mesh(data=2), devices)
    assert sharding.make_mesh(config.Mesh(data=-1), devices).size == 4
