"""How tokens reach the experts of other devices along the mesh axis expert, and what comes of them returns.

A device computes in rounds, each of so many rows at most. What it computes then are tokens, weights and a plan for
`routed_swiglu`. A transport delivers them, and collects the results, of which `per_token` and `per_slot` make what
belongs to the device's own tokens.
"""

import math
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jmoe import config
from jmoe.config import AllGather, AllToAll, Automatic, InputError, RaggedAllToAll
from jmoe.ops.permute import plan, sum_slots, window

BUFFER = 1.25
"""Rows of a round over a device's share of all slots, where nothing may be dropped."""


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


def make_transport(layout: Layout, expert_ids: Array) -> Gathered | Exchanged:
    """The transport of a layer, on a device: within `shard_map`, of the device's own expert ids."""
    kinds = {AllGather: Gathered, AllToAll: Exchanged, RaggedAllToAll: RaggedExchanged}
    return kinds[type(layout.transport)](layout, expert_ids)
