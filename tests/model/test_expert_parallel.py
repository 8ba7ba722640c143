"""The experts on eight devices against one: values, gradients and drops, for every transport."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jmoe import config
from jmoe.config import AllGather, AllToAll, Automatic, InputError, Mesh, RaggedAllToAll
from jmoe.model import expert_parallel
from jmoe.model.expert_parallel import apply_experts, local_experts, place, resolve
from jmoe.model.experts import Experts
from jmoe.sharding import make_mesh, spec, tree_shardings

T, K, D = 64, 3, 16
MODEL = config.Model(d_model=D, init_std=0.5)
LAYERS = {
    "equal": config.MoE(8, 12, config.TopK(K)),
    "arithmetic": config.MoE(8, 32, config.TopK(K), widths="arithmetic"),
    "geometric": config.MoE(8, (2, 2, 4, 6, 8, 10, 18, 40), config.TopK(K)),
}
MESHES = {
    "expert 4, data 2": Mesh(data=2, expert=4),
    "expert 2, fsdp 2, tensor 2": Mesh(fsdp=2, expert=2, tensor=2),
}


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` does, by its documentation, where every device sees what all send."""
    operands, starts, sizes, places = (
        jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    me, row = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for source in range(operands.shape[0]):
        offset = row - places[source, me]
        inside = (offset >= 0) & (offset < sizes[source, me])
        sent = operands[source].at[starts[source, me] + offset].get(mode="clip")
        output = jnp.where(inside.reshape(-1, *(1,) * (output.ndim - 1)), sent, output)
        given = recv_sizes[source] == sizes[source, me]
        output = jnp.where(given, output, jnp.zeros_like(output) * jnp.nan if output.dtype != jnp.int32 else -1)
    return output


@pytest.fixture
def ragged(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(expert_parallel, "resolve", lambda transport, mesh: transport)


ROUTINGS = {
    "uniform": lambda rng: np.argsort(rng.random((T, 8)))[:, :K],
    # All tokens to the same experts, which are neighbours: on one or two devices.
    "skewed": lambda rng: np.tile(np.arange(K), (T, 1)) + np.zeros((T, K), int),
}


def arguments(layer, routing, seed=0):
    rng = np.random.default_rng(seed)
    experts = Experts(layer, MODEL, jax.random.key(seed))
    tokens, d_out = rng.normal(size=(2, T, D)).astype(np.float32)
    expert_ids = ROUTINGS[routing](rng).astype(np.int32)
    expert_ids[rng.random(expert_ids.shape) < 0.2] = 8  # no expert
    combine_weights = np.where(expert_ids < 8, rng.random((T, K)), 0).astype(np.float32)
    return experts, tokens, expert_ids, combine_weights, d_out


def value_and_gradients(experts, tokens, expert_ids, combine_weights, d_out, transport=Automatic()):
    def of(experts, tokens, combine_weights):
        return apply_experts(tokens, expert_ids, combine_weights, experts.weights(), transport)

    out, pullback, dropped = jax.vjp(of, experts, tokens, combine_weights, has_aux=True)
    return out, pullback(d_out), dropped


def on_mesh(mesh, inputs, transport):
    """Inputs sharded as in a model, results on the host."""
    experts, *rest = inputs
    with jax.set_mesh(mesh):
        by_token = NamedSharding(mesh, spec("batch", None))
        placed = jax.device_put(experts, tree_shardings(experts, mesh)), *(jax.device_put(x, by_token) for x in rest)
        result = jax.jit(partial(value_and_gradients, transport=transport))(*placed)
    for leaf in jax.tree.leaves(result):
        assert_copies_agree(leaf)
    return jax.tree.map(np.asarray, result)


def assert_copies_agree(array):
    """Shards that hold the same part of an array are equal: nothing is labelled replicated that is not."""
    seen = {}
    for shard in array.addressable_shards:
        first = seen.setdefault(str(shard.index), shard.data)
        np.testing.assert_array_equal(first, shard.data)


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5), got, want)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("transport", [AllGather(), AllToAll(), RaggedAllToAll()], ids=lambda t: type(t).__name__)
def test_a_mesh_gives_what_one_device_gives(devices, ragged, transport, layer, mesh, routing):
    inputs = arguments(LAYERS[layer], routing)
    want = jax.jit(value_and_gradients)(*inputs)
    assert_close(on_mesh(make_mesh(MESHES[mesh], devices), inputs, transport), want)
