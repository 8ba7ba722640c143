"""Moving rows between token order and expert order: gathers in both directions, forward and backward.

The R = T·K slots of T tokens are sorted by expert. `order[r]` is the slot that sorted row r comes from, `inverse[s]`
the sorted row of slot s; slot s belongs to token s // K. Since the two undo each other, the gradient of either gather
is the other one, and nothing is ever scatter-added.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# TPUs by default round the factors of a float32 product to bfloat16, here the router's weights.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@jax.custom_vjp
def dispatch(
    tokens: Float[Array, "T D"], order: Int[Array, " R"], inverse: Int[Array, "T K"], used: Bool[Array, "T K"]
) -> Float[Array, "R D"]:
    """The token of each sorted row.

    Args:
      tokens: [T, D].
      order: int32 [R = T·K], the slot that each sorted row comes from.
      inverse: int32 [T, K], the sorted row of each slot.
      used: bool [T, K], False for slots without an expert; no gradient comes back from their rows.

    Returns:
      [R, D], in the dtype of `tokens`.
    """
    return tokens[order // inverse.shape[1]]


def _dispatch_forward(tokens, order, inverse, used):
    return dispatch(tokens, order, inverse, used), (inverse, used)


def _dispatch_backward(residuals, d_rows):
    inverse, used = residuals
    d_slots = jnp.where(used[..., None], d_rows[inverse], 0)
    return d_slots.sum(1, dtype=jnp.float32).astype(d_rows.dtype), None, None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(
    rows: Float[Array, "R D"],
    combine_weights: Float[Array, "T K"],
    order: Int[Array, " R"],
    inverse: Int[Array, "T K"],
    used: Bool[Array, "T K"],
) -> Float[Array, "T D"]:
    """Each token's weighted sum of its experts' outputs.

    Args:
      rows: [R, D], the experts' outputs in sorted order.
      combine_weights: float32 [T, K].
      order, inverse, used: as in `dispatch`.

    Returns:
      [T, D] in the dtype of `rows`; summed in float32.
    """
    return _combine_forward(rows, combine_weights, order, inverse, used)[0]


def _combine_forward(rows, combine_weights, order, inverse, used):
    slots = jnp.where(used[..., None], rows[inverse], 0)
    out = _einsum("TKD,TK->TD", slots, combine_weights)
    return out.astype(rows.dtype), (rows, combine_weights, order, inverse, used)


def _combine_backward(residuals, d_out):
    rows, combine_weights, order, inverse, used = residuals
    slots = jnp.where(used[..., None], rows[inverse], 0)
    d_weights = _einsum("TD,TKD->TK", d_out, slots)
    weight_of_row = jnp.where(used, combine_weights, 0).reshape(-1)[order]
    d_rows = (weight_of_row[:, None] * d_out[order // inverse.shape[1]]).astype(rows.dtype)
    return d_rows, d_weights, None, None, None


combine.defvjp(_combine_forward, _combine_backward)
