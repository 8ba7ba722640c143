"""From routing to rows sorted by expert, and back."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Plan(NamedTuple):
    """Where each slot's row goes when rows are sorted by expert; slots without an expert come last."""

    order: Array
    """int32 [R = T·K]: the slot of each sorted row."""
    inverse: Array
    """int32 [T, K]: the sorted row of each slot."""
    used: Array
    """bool [T, K]: whether the slot has an expert."""
    group_sizes: Array
    """int32 [E]: rows of each expert."""


def plan(expert_ids: Int[Array, "T K"], num_experts: int) -> Plan:
    """Sorts the slots by expert, tokens in order within an expert. `expert_ids == num_experts` means no expert."""
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    return Plan(
        order=order,
        inverse=inverse.reshape(expert_ids.shape),
        used=expert_ids < num_experts,
        group_sizes=jnp.bincount(flat, length=num_experts + 1)[:num_experts].astype(jnp.int32),
    )
