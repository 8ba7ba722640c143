"""The exponential moving average of the parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def moving_average(average: Any, params: Any, decay: float, updates: Int[Array, ""]) -> Any:
    """The average of the parameters after each update, weighed by `decay` to the power of the updates since.

    The weights sum to 1 from the first update on, as with Adam's correction (arXiv 1412.6980, §3): the average of n
    takes in the newest with weight (1 − d)/(1 − dⁿ), so that the initial parameters, which no update made, have none.

    Args:
      average: of the updates before this one; a tree like `params`, any values if there were none.
      params: a tree of float32 arrays.
      decay: d, in (0, 1).
      updates: n, how many there were, this one included.
    """
    log_decay = math.log(decay)
    share = jnp.float32(math.expm1(log_decay)) / jnp.expm1(updates.astype(jnp.float32) * log_decay)
    return jax.tree.map(lambda mean, new: mean + share * (new - mean), average, params)
