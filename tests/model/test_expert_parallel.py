"""The experts on eight devices against one: values, gradients and drops, for every transport."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jmoe import config
from jmoe.config import AllGather, AllToAll, Automatic, InputError, Mesh, RaggedAllToAll
from jmoe.model import expert_parallel
from jmoe.model.expert_parallel import apply_experts
from jmoe.model.experts import Experts
from jmoe.model.transport import Layout, make_transport, place, resolve
from jmoe.sharding import make_mesh, spec, tree_shardings

T, K, D = 64, 3, 16
MODEL = config.Model(d_model=D, init_std=0.5)
LAYERS = {
    "equal": config.MoE(8, 12, config.TopK(K)),
    "arithmetic": config.MoE(8, 32, config.TopK(K), widths="arithmetic"),
    "geometric": config.MoE(8, (2, 2, 4, 6, 8, 10, 18, 40), config.TopK(K)),
}
MESHES = (Mesh(data=2, expert=4), Mesh(fsdp=2, expert=2, tensor=2))


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
    "random": lambda rng: np.argsort(rng.random((T, 8)))[:, :K],
    "balanced": lambda rng: (np.arange(T * K).reshape(T, K) * 3) % 8,
    # All tokens to the same experts, which are neighbours: on one or two devices.
    "skewed": lambda rng: np.tile(np.arange(K), (T, 1)),
}


def arguments(layer, routing, seed=0):
    rng = np.random.default_rng(seed)
    experts = Experts(layer, MODEL, jax.random.key(seed))
    tokens, d_out = rng.normal(size=(2, T, D)).astype(np.float32)
    expert_ids = ROUTINGS[routing](rng).astype(np.int32)
    expert_ids[rng.random(expert_ids.shape) < 0.2] = 8  # no expert
    combine_weights = np.where(expert_ids < 8, rng.random((T, K)), 0).astype(np.float32)
    return experts, tokens, expert_ids, combine_weights, d_out


def value_and_gradients(transport, experts, tokens, expert_ids, combine_weights, d_out):
    """The output, the gradients of experts, tokens and combine weights, and the drops."""

    def of(experts, tokens, combine_weights):
        return apply_experts(tokens, expert_ids, combine_weights, experts.weights(), transport)

    out, pullback, dropped = jax.vjp(of, experts, tokens, combine_weights, has_aux=True)
    return out, pullback(d_out), dropped


@cache
def compiled(transport, mesh):
    return jax.jit(partial(value_and_gradients, transport))


def on_mesh(sizes, inputs, transport):
    """Inputs sharded as in a model, results on the host."""
    mesh, (experts, *rest) = make_mesh(sizes), inputs
    with jax.set_mesh(mesh):
        by_token = NamedSharding(mesh, spec("batch", None))
        placed = jax.device_put(experts, tree_shardings(experts, mesh)), *(jax.device_put(x, by_token) for x in rest)
        result = compiled(transport, sizes)(*placed)
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


TRANSPORTS = (AllGather(), AllToAll(), RaggedAllToAll())
CASES = [(transport, "equal", mesh) for transport in TRANSPORTS for mesh in MESHES]
CASES += [(transport, "geometric", MESHES[-1]) for transport in TRANSPORTS] + [(AllToAll(), "arithmetic", MESHES[0])]


@pytest.mark.parametrize("transport, layer, mesh", CASES, ids=str)
def test_a_mesh_gives_what_one_device_gives(devices, ragged, transport, layer, mesh):
    for routing in ROUTINGS:
        inputs = arguments(LAYERS[layer], routing)
        want = compiled(Automatic(), None)(*inputs)
        assert_close(on_mesh(mesh, inputs, transport), want)


@pytest.mark.parametrize("transport", [AllToAll, RaggedAllToAll])
def test_drops_are_counted_over_the_mesh_and_are_the_lowest_choices_and_the_last_tokens(devices, ragged, transport):
    """The other slots give what they give without drops."""
    inputs = experts, tokens, expert_ids, combine_weights, d_out = arguments(LAYERS["equal"], "skewed")
    out, gradients, dropped = on_mesh(MESHES[0], inputs, transport(1.0))
    kept = gradients[2] != 0  # a dropped slot has no part in anything
    used = expert_ids < 8
    assert not kept[~used].any()
    assert dropped == (used & ~kept).sum() > T / 2
    want = compiled(Automatic(), None)(experts, tokens, np.where(kept, expert_ids, 8), combine_weights, d_out)
    assert_close((out, gradients), want[:2])
    for rows in np.split(np.arange(T), 8):
        slots = kept[rows][:, :2].T[used[rows][:, :2].T]  # of one device to the one of experts 0 and 1
        assert (np.diff(slots.astype(int)) <= 0).all()


@pytest.mark.parametrize("transport", [AllGather, AllToAll, RaggedAllToAll])
def test_balanced_loads_take_one_round(devices, ragged, transport):
    """And skewed ones take as many as it takes."""

    def rounds(routing):
        layout = Layout(transport(), (12,) * 8, place((12,) * 8, 4), 1)
        count = lambda ids: make_transport(layout, ids).rounds.reshape(1)  # noqa: E731
        _, _, expert_ids, *_ = arguments(LAYERS["equal"], routing)
        with jax.set_mesh(make_mesh(MESHES[0])):
            by_token = spec("batch", None)
            return jax.shard_map(count, in_specs=by_token, out_specs=spec("batch"), check_vma=False)(expert_ids).max()

    assert rounds("balanced") == 1
    assert rounds("skewed") == 2  # two thirds of all rows to a quarter of the devices, each with room for 1.25 quarters


def test_experts_are_placed_so_that_devices_hold_about_equal_parameters():
    def loads(moe, devices):
        own = place(moe.expert_widths, devices)
        assert sorted(e for experts in own for e in experts) == list(range(moe.num_experts))
        return [sum(moe.expert_widths[e] for e in experts) for experts in own]

    for devices in (2, 4):
        for widths in ("arithmetic", "hybrid"):
            for experts in (8, 16):
                assert len(set(loads(config.MoE(experts, 256, config.TopK(2), widths=widths), devices))) == 1
        # The widest of 8 has half of all parameters, and stays whole.
        assert max(loads(config.MoE(8, 255, config.TopK(2), widths="geometric"), devices)) == 1024
    assert place((5,) * 8, 4) == ((0, 1), (2, 3), (4, 5), (6, 7))
    with pytest.raises(InputError, match="MoE.num_experts = 6 is not divisible by mesh.expert = 4"):
        place((5,) * 6, 4)
    with pytest.raises(InputError, match="3 is not divisible by mesh.expert = 4"):
        place((5, 6, 7), 4)


@pytest.mark.parametrize("layer", ["equal", "arithmetic"])
def test_weights_are_not_gathered_along_expert(devices, layer):
    """What a device gathers of them are pieces along fsdp of its own experts; the program says which devices take part.
    Tokens are few here, so that nothing else is as large."""
    mesh, wide = make_mesh(Mesh(fsdp=2, expert=4)), config.Model(d_model=64)
    experts = Experts(config.MoE(8, 128, config.TopK(K), widths=layer), wide, jax.random.key(0))
    rows = [
        np.zeros((8, n), dtype) for n, dtype in ((64, np.float32), (K, np.int32), (K, np.float32), (64, np.float32))
    ]
    with jax.set_mesh(mesh):
        placed = jax.device_put(experts, tree_shardings(experts, mesh))
        by_token = NamedSharding(mesh, spec("batch", None))
        inputs = placed, *(jax.device_put(x, by_token) for x in rows)
        text = jax.jit(partial(value_and_gradients, AllToAll())).lower(*inputs).compile().as_text()
    gathers = re.findall(r"= f32\[([\d,]+)\].* all-gather\(.*replica_groups=(?:mesh\S+ )?(\S+),", text)
    large = [groups for shape, groups in gathers if np.prod([int(n) for n in shape.split(",")]) >= 64 * 128]
    along_fsdp = "{{0,4},{1,5},{2,6},{3,7}}", "[4,2]<=[2,4]T(1,0)", "{'fsdp'}"  # XLA has three ways to write it
    assert len(large) >= 3 and set(large) <= set(along_fsdp)
    per_device = 3 * 64 * 128 * 8 // 8
    assert sum(w.addressable_shards[0].data.size for w in jax.tree.leaves(placed)) == per_device


def test_a_transport_that_the_platform_lacks_is_told_before_anything_is_compiled(devices):
    mesh = make_mesh(Mesh(data=2, expert=4))
    with pytest.raises(InputError, match="RaggedAllToAll, which CPUs lack; AllToAll and AllGather"):
        resolve(RaggedAllToAll(), mesh)
    assert resolve(Automatic(1.5), mesh) == AllToAll(1.5)
    assert resolve(RaggedAllToAll(), make_mesh(Mesh(data=8))) == AllGather()  # nothing to transport
