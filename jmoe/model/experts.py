"""A bank of SwiGLU experts, on rows sorted by expert."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jmoe import config
from jmoe.model.layers import normal, parameter
from jmoe.ops.grouped_matmul import grouped_matmul


def swiglu_experts(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "R D"]:
    """(silu(x · gate_e) ∘ (x · up_e)) · down_e for the rows x of each expert e; zero for rows past the last group."""
    hidden = jax.nn.silu(grouped_matmul(rows, gate, group_sizes)) * grouped_matmul(rows, up, group_sizes)
    return grouped_matmul(hidden, down, group_sizes)


class Experts(nnx.Module):
    """The weights of a layer's experts, stacked."""

    def __init__(self, moe: config.MoE, model: config.Model, key: PRNGKeyArray):
        E, D, F = moe.num_experts, model.d_model, moe.d_ff
        gate, up, down = jax.random.split(key, 3)
        self.gate = parameter(normal(gate, (E, D, F), model.init_std), "expert", "embed", "expert_mlp")
        self.up = parameter(normal(up, (E, D, F), model.init_std), "expert", "embed", "expert_mlp")
        self.down = parameter(normal(down, (E, F, D), model.init_std), "expert", "expert_mlp", "embed")
