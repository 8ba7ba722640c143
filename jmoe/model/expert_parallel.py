"""The MoE layer's computation on a mesh: the only `shard_map` of the model.

Every device sorts and multiplies its own tokens; the weights come to it whole, so the result is exact and nothing is
dropped on any mesh. Routing is decided outside, on global expert ids.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jmoe.ops.permute import plan
from jmoe.ops.routed_swiglu import ExpertWeights, routed_swiglu
from jmoe.sharding import spec


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
) -> Float[Array, "T D"]:
    """`local_experts` on the mesh in use: tokens split over the batch axes, weights gathered.

    Args:
      tokens: [T, D].
      expert_ids: int32 [T, K], numbered through the buckets in order; their number of experts means none.
      combine_weights: float32 [T, K].
      buckets: the experts' weights, float32.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local_experts(tokens, expert_ids, combine_weights, buckets)
    by_token, whole = spec("batch", None), PartitionSpec()
    # Unchecked, since Pallas kernels do not say over which axes their results vary.
    on_device = jax.shard_map(
        local_experts, in_specs=(by_token, by_token, by_token, whole), out_specs=by_token, check_vma=False
    )
    # Rounded before they are gathered.
    buckets = jax.tree.map(lambda weight: weight.astype(tokens.dtype), buckets)
    return on_device(tokens, expert_ids, combine_weights, buckets)
