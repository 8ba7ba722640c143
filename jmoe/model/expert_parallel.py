"""The experts on a mesh: the only `shard_map` of the model, and all that a layer's experts communicate.

Tokens are split over data, fsdp and expert; of the experts a device has those of its place along expert, of their
matrices a piece along fsdp, which is gathered for the time of the layer, and one along tensor, whose partial outputs
are added. Routing is decided outside, on global expert ids.

Nothing is dropped and memory stays bounded: a device computes in rounds, each of a buffer of rows somewhat larger than
its share. Balanced loads fit in the first, and the others do not run. The backward pass sends what the forward pass
sends, in the other direction; it keeps what the first round received, and repeats the others.
"""

import math
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jmoe import config
from jmoe.config import AllGather, AllToAll, Automatic, InputError, RaggedAllToAll
from jmoe.ops import routed_swiglu as ops
from jmoe.ops.permute import plan, sum_slots, window
from jmoe.ops.routed_swiglu import ExpertWeights, routed_swiglu
from jmoe.sharding import MESH_AXES, spec

BUFFER = 1.25
"""Rows of a round over a device's share of all slots, where nothing may be dropped."""


def local_experts(
    tokens: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    combine_weights: Float[Array, "T K"],
    buckets: tuple[ExpertWeights, ...],
) -> Float[Array, "T D"]:
    """The experts on one device: Σ_k combine_weights[t, k] · expert_{ids[t, k]}(token t), [T, D]."""
    num_experts = sum(bucket.gate.shape[0] for bucket in buckets)
    return routed_swiglu(tokens, combine_weights, plan(expert_ids, num_experts), buckets)


def apply_experts(
    tokens: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    combine_weights: Float[Array, "T K"],
    buckets: tuple[ExpertWeights, ...],
    transport: config.Transport = Automatic(),
) -> tuple[Float[Array, "T D"], Float[Array, ""]]:
    """`local_experts` on the mesh in use.

    Args:
      tokens: [T, D].
      expert_ids: int32 [T, K], numbered through the buckets in order; their number of experts means none.
      combine_weights: float32 [T, K].
      buckets: the experts' weights, float32.
      transport: how tokens reach experts on other devices.

    Returns:
      [T, D] in the dtype of `tokens`, and the assignments dropped over the whole mesh for want of capacity.

    Raises:
      InputError: the transport is not for the platform of the mesh, or the experts cannot be shared out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local_experts(tokens, expert_ids, combine_weights, buckets), jnp.zeros(())
    widths = tuple(bucket.gate.shape[2] for bucket in buckets for _ in range(bucket.gate.shape[0]))
    layout = Layout(resolve(transport, mesh), widths, place(widths, mesh.shape["expert"]), mesh.shape["tensor"])
    return _on_mesh(layout, tokens, expert_ids, combine_weights, buckets)


def resolve(transport: config.Transport, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> config.Transport:
    """The transport that is used on a mesh.

    Raises:
      InputError: it needs an operation that the platform of the mesh lacks.
    """
    mesh = mesh.abstract_mesh if isinstance(mesh, jax.sharding.Mesh) else mesh
    ragged = mesh.abstract_device is not None and mesh.abstract_device.platform != "cpu"
    if mesh.shape["expert"] == 1:
        return AllGather()
    if isinstance(transport, Automatic):
        return (RaggedAllToAll if ragged else AllToAll)(transport.capacity)
    if isinstance(transport, RaggedAllToAll) and not ragged:
        raise InputError("transport is RaggedAllToAll, which CPUs lack; AllToAll and AllGather work everywhere")
    return transport


def check_experts(settings: config.Config, mesh: jax.sharding.Mesh) -> None:
    """Raises `InputError` if the transport is not for the mesh, or a layer's experts cannot be shared out on it."""
    resolve(settings.transport, mesh)
    for feed_forward in (layer for group in settings.model.layers for layer in group.pattern):
        if isinstance(feed_forward, config.MoE):
            place(feed_forward.expert_widths, mesh.shape["expert"])


@cache
def place(widths: tuple[int, ...], devices: int) -> tuple[tuple[int, ...], ...]:
    """The experts of each device: neighbours if all are of one width, else so that the sums of widths are about equal
    (the widest first, each to the device that has least so far: Graham 1969).

    Raises:
      InputError: there are fewer experts than devices, or those of one width are not divisible by them.
    """
    equal = len(set(widths)) == 1
    if len(widths) < devices or (equal and len(widths) % devices):
        raise InputError(f"MoE.num_experts = {len(widths)} is not divisible by mesh.expert = {devices}")
    if equal:
        return tuple(map(tuple, np.arange(len(widths)).reshape(devices, -1).tolist()))
    owned: list[list[int]] = [[] for _ in range(devices)]
    for e in sorted(range(len(widths)), key=lambda e: -widths[e]):
        min(owned, key=lambda own: sum(widths[i] for i in own)).append(e)
    return tuple(tuple(sorted(own)) for own in owned)


class Layout(NamedTuple):
    """What is known before any array: hashable, so that it can be static."""

    transport: config.Transport
    widths: tuple[int, ...]
    """of each expert"""
    experts: tuple[tuple[int, ...], ...]
    """of each device along expert"""
    tensor: int
    """devices that each have a part of every width"""

    @property
    def devices(self) -> int:
        return len(self.experts)

    @property
    def groups(self) -> int:
        """The most experts of a device. Expert j of device i is in place i · groups + j."""
        return max(map(len, self.experts))

    @property
    def uniform(self) -> bool:
        """All devices have the same widths."""
        return self.devices == 1 or len(set(self.widths)) == 1

    def places(self, expert_ids: Array) -> Array:
        """Of experts by id; devices · groups for no expert."""
        if self.uniform:
            return expert_ids
        places = np.full(len(self.widths) + 1, self.devices * self.groups)
        for device, experts in enumerate(self.experts):
            places[list(experts)] = device * self.groups + np.arange(len(experts))
        chosen = expert_ids[..., None] == np.arange(len(places))[None, None]
        return jnp.sum(jnp.where(chosen, places[None, None], 0), axis=-1, dtype=jnp.int32)

    def buffer(self, T: int, K: int) -> tuple[int, bool]:
        """Rows of a round for T tokens on every device, and whether there may be more than one round."""
        most = self.devices * T * min(K, self.groups)
        capacity = None if isinstance(self.transport, AllGather) else self.transport.capacity
        each = math.ceil((BUFFER if capacity is None else capacity) * T * K / self.devices)
        rows = min(self.devices * each, most)
        return rows, capacity is None and rows < most


# ------------------------------------------------------------------------------------------------------------- transport
#
# What a device computes in a round are tokens, weights and a plan for `routed_swiglu`. A transport delivers them, and
# collects what comes out into what `per_token` and `per_slot` give back to the devices that the tokens came from.


class Gathered:
    """The tokens of all devices along expert, on each of them."""

    dropped = 0

    def __init__(self, layout: Layout, expert_ids: Array):
        self.rows, self.more = layout.buffer(*expert_ids.shape)
        ids = self._gather(layout.places(expert_ids)) - lax.axis_index("expert") * layout.groups
        ids = jnp.where((ids >= 0) & (ids < layout.groups), ids, layout.groups)
        self.plan = plan(ids, layout.groups)
        self.rounds = -(-self.plan.group_sizes.sum() // self.rows)

    def deliver(self, r, per_token):
        return self._gather(per_token)

    def routing(self, r, combine_weights):
        one = self.rows == self.plan.order.size
        return self._gather(combine_weights), self.plan if one else window(self.plan, r * self.rows, self.rows)

    def collect(self, r, of_tokens, so_far=None):
        return of_tokens if so_far is None else so_far + of_tokens

    collect_slots = collect

    def per_token(self, collected):
        return lax.psum_scatter(collected, "expert", scatter_dimension=0, tiled=True)

    per_slot = per_token

    def _gather(self, x):
        return lax.all_gather(x, "expert", tiled=True)


class Exchanged:
    """Each slot's row on the device of its expert, in messages of one size.

    A device sorts its slots by the device they go to, within that first choices before second ones: it is the ends of
    these lists that a bounded buffer drops. In round r it sends of the list for each device the rows from `first[r]`
    on, `size[r]` of them, which come to lie there from `where[r]` on.
    """

    def __init__(self, layout: Layout, expert_ids: Array):
        T, K = expert_ids.shape
        self.tokens, self.groups, self.devices = T, layout.groups, layout.devices
        self.rows, self.more = layout.buffer(T, K)
        self.me = lax.axis_index("expert")
        self.places = layout.places(expert_ids).T
        self.plan = plan(self.places // layout.groups, layout.devices)
        self.counts = lax.all_gather(self.plan.group_sizes, "expert")  # [source, destination]
        self.begin = jnp.cumsum(self.counts, axis=1) - self.counts
        self.rounds = self._rounds()
        _, size, _ = self.message(0)
        self.dropped = 0 if self.more else self.counts.sum() - size.sum()

    def _rounds(self):
        return -(-self.counts.max() // (self.rows // self.devices))

    def message(self, r) -> tuple[Array, Array, Array]:
        """(first, size, where) of each source and destination."""
        each = self.rows // self.devices
        first = jnp.minimum(r * each, self.counts)
        where = jnp.arange(self.devices)[:, None] * each
        return first, jnp.minimum(self.counts - first, each), jnp.broadcast_to(where, first.shape)

    def deliver(self, r, per_token):
        return self.send(r, per_token[self._order(r) % self.tokens])

    def routing(self, r, combine_weights):
        order = self._order(r)
        weights = self.send(r, combine_weights.T.reshape(-1)[order])
        expert = self.send(r, self.places.reshape(-1)[order] % self.groups, fill=self.groups)
        return weights[:, None], plan(expert[:, None], self.groups)

    def collect(self, r, rows, so_far=None):
        if so_far is None:
            so_far = jnp.zeros((self.plan.order.size, *rows.shape[1:]), rows.dtype)
        return self.give_back(r, rows, so_far)

    def collect_slots(self, r, of_slots, so_far=None):
        return self.collect(r, of_slots[:, 0], so_far)

    def per_token(self, collected):
        return sum_slots(collected, self.plan.inverse.T, self.plan.used.T)

    def per_slot(self, collected):
        return jnp.where(self.plan.used, collected[self.plan.inverse], 0).T

    def _order(self, r):
        """The slots in the order of the rows. For later rounds kept apart, lest rows be kept that are not needed."""
        return self.plan.order if isinstance(r, int) else lax.optimization_barrier((self.plan.order, r))[0]

    def send(self, r, rows, fill=0):
        """What the devices along expert have for this one: [rows of a round, ...], `fill` in the places left."""
        return lax.all_to_all(rows.at[self._places(r)].get(mode="fill", fill_value=fill), "expert", 0, 0, tiled=True)

    def give_back(self, r, rows, to):
        """The way back of `send`: rows [R, ...] in the order of `plan` with those that were sent written into `to`."""
        messages = lax.all_to_all(rows, "expert", 0, 0, tiled=True)
        return to.at[self._places(r)].set(messages, mode="drop", unique_indices=True)

    def _places(self, r):
        """The row in each place of the messages."""
        first, size, where = self.message(r)
        return _segments(self.rows, where[:, 0], size[self.me], (self.begin + first)[self.me], self.plan.order.size)


class RaggedExchanged(Exchanged):
    """The same in messages of the size that is needed: they share the buffer of the device that they go to.

    One number a row would take the space of 128 on TPU, so numbers are gathered by every device instead.
    """

    def _rounds(self):
        return -(-self.counts.sum(0).max() // self.rows)

    def message(self, r):
        start = jnp.cumsum(self.counts, axis=0) - self.counts - r * self.rows
        first, last = (jnp.clip(edge - start, 0, self.counts) for edge in (0, self.rows))
        return first, last - first, jnp.clip(start, 0, self.rows)

    def send(self, r, rows, fill=0):
        first, size, where = self.message(r)
        row = self.begin + first
        if rows.ndim == 1:
            of_all = lax.all_gather(rows, "expert", tiled=True)
            parts = jnp.arange(self.devices) * rows.size
            place = _segments(self.rows, where[:, self.me], size[:, self.me], row[:, self.me] + parts, of_all.size)
            return of_all.at[place].get(mode="fill", fill_value=fill)
        buffer = jnp.full((self.rows, *rows.shape[1:]), fill, rows.dtype)
        offsets = row[self.me], size[self.me], where[self.me], size[:, self.me]
        return lax.ragged_all_to_all(rows, buffer, *offsets, axis_name="expert")

    def give_back(self, r, rows, to):
        first, size, where = self.message(r)
        row = self.begin + first
        if rows.ndim == 1:
            of_all = lax.all_gather(rows, "expert", tiled=True)
            parts = jnp.arange(self.devices) * self.rows
            place = _segments(to.size, row[self.me], size[self.me], where[self.me] + parts, of_all.size)
            return jnp.where(place < of_all.size, of_all.at[place].get(mode="clip"), to)
        offsets = where[:, self.me], size[:, self.me], row[:, self.me], size[self.me]
        return lax.ragged_all_to_all(rows, to, *offsets, axis_name="expert")


def _segments(length: int, start: Array, size: Array, source: Array, none: int) -> Array:
    """An index for each of `length` places: segment i is the `size[i]` places from `start[i]` on, whose indices count
    from `source[i]` on; `none` outside of the segments."""
    offset = jnp.arange(length)[:, None] - start[None]
    inside = (offset >= 0) & (offset < size[None])
    index = jnp.sum(jnp.where(inside, source[None] + offset, 0), axis=1)
    return jnp.where(inside.any(1), index, none)


def _transport(layout: Layout, expert_ids: Array) -> Gathered | Exchanged:
    kinds = {AllGather: Gathered, AllToAll: Exchanged, RaggedAllToAll: RaggedExchanged}
    return kinds[type(layout.transport)](layout, expert_ids)


def _rounds(transport: Gathered | Exchanged, body: Any, first: Any) -> Any:
    """`first`, the result of round 0, through body(r, result so far) for the other rounds, the same on all devices."""
    if not transport.more:
        return first
    rounds = lax.pmax(transport.rounds, MESH_AXES)
    with jax.named_scope("further_rounds"):
        step = lambda carry: (carry[0] + 1, body(*carry))  # noqa: E731
        return lax.while_loop(lambda carry: carry[0] < rounds, step, (jnp.int32(1), first))[1]


# --------------------------------------------------------------------------------------------------- weights and products


def _own(layout: Layout, buckets: tuple[ExpertWeights, ...]) -> tuple[ExpertWeights, ...]:
    """The matrices of this device's experts, gathered over fsdp: the buckets if devices have the same widths, else side
    by side, [1, D, F] for F of the device that has most. Experts of one width among others are stored in pieces of
    every expert on every device along expert, and come together here."""
    if not layout.uniform:
        experts = [ExpertWeights(*(w[i] for w in bucket)) for bucket in buckets for i in range(bucket.gate.shape[0])]
        most = max(sum(experts[e].gate.shape[1] for e in own) for own in layout.experts)

        def side_by_side(own):
            gate, up, down = (jnp.concatenate([experts[e][m] for e in own], axis) for m, axis in enumerate((1, 1, 0)))
            wide, long = ((0, 0), (0, most - gate.shape[1])), ((0, most - gate.shape[1]), (0, 0))
            return ExpertWeights(jnp.pad(gate, wide), jnp.pad(up, wide), jnp.pad(down, long))

        of_devices = jax.tree.map(lambda *x: jnp.stack(x), *map(side_by_side, layout.experts))
        exchange = partial(lax.all_to_all, axis_name="expert", split_axis=0, tiled=True)
        gate, up, down = of_devices
        buckets = (ExpertWeights(*(exchange(w, concat_axis=a) for w, a in ((gate, 1), (up, 1), (down, 2)))),)
    gather = partial(lax.all_gather, axis_name="fsdp", tiled=True)
    return tuple(ExpertWeights(gather(b.gate, axis=1), gather(b.up, axis=1), gather(b.down, axis=2)) for b in buckets)


def _experts_of(layout: Layout, device: int, own: tuple[ExpertWeights, ...]) -> tuple[ExpertWeights, ...]:
    """A device's experts, a bucket each, from their matrices side by side."""
    (own_weights,), parts, start = own, [], 0
    for e in layout.experts[device]:
        end = start + layout.widths[e] // layout.tensor
        gate, up, down = own_weights
        parts.append(ExpertWeights(gate[:, :, start:end], up[:, :, start:end], down[:, start:end]))
        start = end
    return tuple(parts)


def _swiglu(layout, own, x, weights, plan):
    """`routed_swiglu.forward` with this device's experts."""
    if layout.uniform:
        return ops.forward(x, weights, plan, own)

    def of_device(device, own, x, weights, plan):
        return ops.forward(x, weights, plan, _experts_of(layout, device, own))

    devices = [partial(of_device, device) for device in range(layout.devices)]
    shapes = [jax.eval_shape(f, own, x, weights, plan)[1].shape for f in devices]
    common = tuple(map(max, *shapes))

    def padded(f, *inputs):
        out, *projections = f(*inputs)
        return out, *(
            jnp.pad(p, [(0, to - size) for to, size in zip(common, p.shape, strict=True)]) for p in projections
        )

    return lax.switch(lax.axis_index("expert"), [partial(padded, f) for f in devices], own, x, weights, plan)


def _swiglu_backward(layout, own, x, weights, plan, gate, up, d_out):
    """`routed_swiglu.backward` with this device's experts."""
    if layout.uniform:
        return ops.backward(x, weights, plan, own, gate, up, d_out)

    def of_device(device, own, x, weights, plan, gate, up, d_out):
        experts, pullback = jax.vjp(partial(_experts_of, layout, device), own)
        rows, width = jax.eval_shape(ops.forward, x, weights, plan, experts)[1].shape
        gate, up = gate[:rows, :width], up[:rows, :width]
        d_x, d_weights, d_experts = ops.backward(x, weights, plan, experts, gate, up, d_out)
        return d_x, d_weights, *pullback(d_experts)

    devices = [partial(of_device, device) for device in range(layout.devices)]
    return lax.switch(lax.axis_index("expert"), devices, own, x, weights, plan, gate, up, d_out)


# ----------------------------------------------------------------------------------------------------------------- layer


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_mesh(layout, tokens, expert_ids, combine_weights, buckets):
    return _forward(layout, tokens, expert_ids, combine_weights, buckets)[0]


def _mapped(f, buckets, in_specs, out_specs):
    """Under `shard_map`; in the specs a letter stands for arrays by token, weights, residuals, or a sum over all."""
    axis = "expert" if len(buckets) == 1 else "bucket"
    up, down = spec(axis, "embed", "expert_mlp"), spec(axis, "expert_mlp", "embed")
    specs: dict[str, Any] = {"t": spec("batch", None), "r": PartitionSpec(MESH_AXES), "s": PartitionSpec()}
    specs["w"] = tuple(ExpertWeights(up, up, down) for _ in buckets)
    given = {"in_specs": tuple(specs[s] for s in in_specs), "out_specs": tuple(specs[s] for s in out_specs)}
    # Unchecked, since Pallas kernels do not say over which axes their results vary.
    return jax.shard_map(f, **given, check_vma=False)


def _forward(layout, tokens, expert_ids, combine_weights, buckets):
    def on_device(tokens, expert_ids, combine_weights, buckets):
        transport = _transport(layout, expert_ids)
        own = _own(layout, jax.tree.map(lambda w: w.astype(tokens.dtype), buckets))  # rounded before it is gathered

        def compute(r):
            x, routing = transport.deliver(r, tokens), transport.routing(r, combine_weights)
            out, gate, up = _swiglu(layout, own, x, *routing)
            return out, (x, *routing, gate, up)

        out, kept = compute(0)
        out = _rounds(
            transport, lambda r, so_far: transport.collect(r, compute(r)[0], so_far), transport.collect(0, out)
        )
        dropped = lax.psum(jnp.float32(transport.dropped), ("data", "fsdp"))
        return lax.psum(transport.per_token(out), "tensor"), dropped, kept

    inputs = tokens, expert_ids, combine_weights, buckets
    out, dropped, kept = _mapped(on_device, buckets, "tttw", "tsr")(*inputs)
    return (out, dropped), (inputs, kept)


def _backward(layout, residuals, cotangents):
    inputs, kept = residuals

    def on_device(tokens, expert_ids, combine_weights, buckets, kept, d_out):
        transport = _transport(layout, expert_ids)
        rounded = jax.tree.map(lambda w: w.astype(tokens.dtype), buckets)
        own, pullback = jax.vjp(partial(_own, layout), rounded)

        def compute(r, kept):
            return _swiglu_backward(layout, own, *kept, transport.deliver(r, d_out))

        def further(r, so_far):
            x, routing = transport.deliver(r, tokens), transport.routing(r, combine_weights)
            _, gate, up = _swiglu(layout, own, x, *routing)
            d_x, d_weights, d_own = compute(r, (x, *routing, gate, up))
            so_far_tokens, so_far_slots, so_far_own = so_far
            return (
                transport.collect(r, d_x, so_far_tokens),
                transport.collect_slots(r, d_weights, so_far_slots),
                jax.tree.map(jnp.add, so_far_own, d_own),
            )

        d_x, d_weights, d_own = compute(0, kept)
        first = transport.collect(0, d_x), transport.collect_slots(0, d_weights), d_own
        d_x, d_weights, d_own = _rounds(transport, further, first)
        d_tokens, d_weights = lax.psum((transport.per_token(d_x), transport.per_slot(d_weights)), "tensor")
        (d_buckets,) = pullback(d_own)
        d_buckets = jax.tree.map(lambda d: lax.psum(d, "data").astype(jnp.float32), d_buckets)
        return d_tokens, d_weights, d_buckets

    buckets = inputs[3]
    d_tokens, d_weights, d_buckets = _mapped(on_device, buckets, "tttwrt", "ttw")(*inputs, kept, cotangents[0])
    return d_tokens, None, d_weights, d_buckets


_on_mesh.defvjp(_forward, _backward)
