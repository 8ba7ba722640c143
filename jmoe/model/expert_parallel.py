"""The experts on a mesh: all that a layer's experts communicate.

Tokens are split over data, fsdp and expert; of the experts a device has those of its place along expert, of their
matrices a piece along fsdp, which is gathered for the time of the layer, and one along tensor, whose partial outputs
are added. Routing is decided outside, on global expert ids.

Nothing is dropped and memory stays bounded: a device computes in rounds, each of a buffer of rows somewhat larger than
its share. Balanced loads fit in the first, and the others do not run. The backward pass sends what the forward pass
sends, in the other direction; it keeps what the first round received, and repeats the others.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jmoe import config
from jmoe.config import Automatic
from jmoe.flops import feed_forwards
from jmoe.model.transport import Exchanged, Gathered, Layout, make_transport, place, resolve
from jmoe.ops import routed_swiglu as ops
from jmoe.ops.matmul import rounded
from jmoe.ops.permute import plan
from jmoe.ops.routed_swiglu import ExpertWeights, routed_swiglu
from jmoe.sharding import MESH_AXES, spec, undivided


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
    if undivided():
        return local_experts(tokens, expert_ids, combine_weights, buckets), jnp.zeros(())
    mesh = jax.sharding.get_abstract_mesh()
    widths = tuple(bucket.gate.shape[2] for bucket in buckets for _ in range(bucket.gate.shape[0]))
    layout = Layout(resolve(transport, mesh), widths, place(widths, mesh.shape["expert"]), mesh.shape["tensor"])
    return _on_mesh(layout, tokens, expert_ids, combine_weights, buckets)


def check_experts(settings: config.Config, mesh: jax.sharding.Mesh) -> None:
    """Raises `InputError` if the transport is not for the mesh, or a layer's experts cannot be shared out on it."""
    resolve(settings.transport, mesh)
    for feed_forward in feed_forwards(settings.model):
        if isinstance(feed_forward, config.MoE):
            place(feed_forward.expert_widths, mesh.shape["expert"])


def _rounds(transport: Gathered | Exchanged, body: Any, first: Any) -> Any:
    """`first`, the result of round 0, through body(r, result so far) for the other rounds, the same on all devices."""
    if not transport.more:
        return first
    rounds = lax.pmax(transport.rounds, MESH_AXES)
    with jax.named_scope("further_rounds"):
        step = lambda carry: (carry[0] + 1, body(*carry))  # noqa: E731
        return lax.while_loop(lambda carry: carry[0] < rounds, step, (jnp.int32(1), first))[1]


# ------------------------------------------------------------------------------------------------ weights and products


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


def _swiglu_backward(layout, own, kept, d_out):
    """`routed_swiglu.backward` with this device's experts; kept are the other arguments and results of `_swiglu`."""
    x, weights, plan, gate, up = kept
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


# --------------------------------------------------------------------------------------------------------------- layer


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_mesh(layout, tokens, expert_ids, combine_weights, buckets):
    return _forward(layout, tokens, expert_ids, combine_weights, buckets)[0]


def _mapped(f, buckets, in_specs, out_specs):
    """Under `shard_map`; in the specs a letter stands for arrays by token, weights, residuals, or a sum over all."""
    axis = "expert" if len(buckets) == 1 else "bucket"
    up: Any = spec(axis, "embed", "expert_mlp")
    down: Any = spec(axis, "expert_mlp", "embed")
    specs: dict[str, Any] = {"t": spec("batch", None), "r": PartitionSpec(MESH_AXES), "s": PartitionSpec()}
    specs["w"] = tuple(ExpertWeights(up, up, down) for _ in buckets)
    in_specs, out_specs = (tuple(specs[letter] for letter in letters) for letters in (in_specs, out_specs))
    # Unchecked, since Pallas kernels do not say over which axes their results vary.
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _forward(layout, tokens, expert_ids, combine_weights, buckets):
    def on_device(tokens, expert_ids, combine_weights, buckets):
        transport = make_transport(layout, expert_ids)
        own = _own(layout, jax.tree.map(lambda w: rounded(w, tokens.dtype), buckets))  # before they are gathered

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
        transport = make_transport(layout, expert_ids)
        own, pullback = jax.vjp(partial(_own, layout), jax.tree.map(lambda w: rounded(w, tokens.dtype), buckets))

        def compute(r, kept):
            return _swiglu_backward(layout, own, kept, transport.deliver(r, d_out))

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
