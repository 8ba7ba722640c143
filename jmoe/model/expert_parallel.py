"""The MoE layer's computation on a mesh: the only `shard_map` of the model.

Every device sorts and multiplies its own tokens; the weights come to it whole, so the result is exact and nothing is
dropped on any mesh. Routing is decided outside, on global expert ids.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jmoe.model.dispatch import plan
from jmoe.model.experts import ExpertWeights, swiglu_experts
from jmoe.ops.permute import combine, dispatch
from jmoe.sharding import TABLE, spec


def local_experts(
    tokens: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    combine_weights: Float[Array, "T K"],
    weights: ExpertWeights,
) -> Float[Array, "T D"]:
    """Dispatch, experts, combine on one device: Σ_k combine_weights[t, k] · expert_{ids[t, k]}(token t), [T, D]."""
    order, inverse, used, group_sizes = plan(expert_ids, weights.gate.shape[0])
    rows = swiglu_experts(dispatch(tokens, order, inverse, used), group_sizes, weights)
    return combine(rows, combine_weights, order, inverse, used)


def apply_experts(
    tokens: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    combine_weights: Float[Array, "T K"],
    weights: ExpertWeights,
) -> Float[Array, "T D"]:
    """`local_experts` on the mesh in use: tokens split over the batch axes, weights gathered."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local_experts(tokens, expert_ids, combine_weights, weights)
    by_token, whole = spec("batch", None), PartitionSpec()

    def on_device(tokens, expert_ids, combine_weights, weights):
        # Said explicitly, since the custom gradients below cannot tell that the weights' gradients differ by device.
        weights = ExpertWeights(*(jax.lax.pcast(w, TABLE["batch"], to="varying") for w in weights))
        return local_experts(tokens, expert_ids, combine_weights, weights)

    return jax.shard_map(on_device, in_specs=(by_token, by_token, by_token, whole), out_specs=by_token)(
        tokens, expert_ids, combine_weights, weights
    )
