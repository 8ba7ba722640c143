"""The weights of a layer's SwiGLU experts."""

from itertools import groupby

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from jmoe import config
from jmoe.model.layers import normal, parameter
from jmoe.ops.routed_swiglu import ExpertWeights


class Bucket(nnx.Module):
    """E experts of one width F, stacked."""

    def __init__(self, E: int, D: int, F: int, std: float, axis: str, key: PRNGKeyArray):
        gate, up, down = jax.random.split(key, 3)
        self.gate = parameter(normal(gate, (E, D, F), std), axis, "embed", "expert_mlp")
        self.up = parameter(normal(up, (E, D, F), std), axis, "embed", "expert_mlp")
        self.down = parameter(normal(down, (E, F, D), std), axis, "expert_mlp", "embed")


class Experts(nnx.Module):
    """The experts of a layer from narrow to wide, a bucket for each width."""

    def __init__(self, moe: config.MoE, model: config.Model, key: PRNGKeyArray):
        sizes = [(len(list(experts)), width) for width, experts in groupby(moe.expert_widths)]
        keys = jax.random.split(key, len(sizes))
        axis = "expert" if len(sizes) == 1 else "bucket"
        self.buckets = nnx.List(
            [Bucket(E, model.d_model, F, model.init_std, axis, key) for (E, F), key in zip(sizes, keys, strict=True)]
        )

    def weights(self) -> tuple[ExpertWeights, ...]:
        """The matrices of each bucket, float32."""
        return tuple(ExpertWeights(bucket.gate[...], bucket.up[...], bucket.down[...]) for bucket in self.buckets)
