"""Clipping and Adam's moments, so that each array of an update is read as few times as XLA allows."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def clip(max_norm: float) -> optax.GradientTransformation:
    """Gradients, multiplied by min(1, max_norm / norm of all of them).

    It is `optax.clip_by_global_norm`, but for a rounding: that one selects between gradients clipped and not, and
    XLA:CPU stores the clipped ones. One factor is multiplied in wherever they are read.
    """
    return optax.stateless(
        lambda gradients, _: optax.tree.scale(jnp.minimum(1.0, max_norm / optax.tree.norm(gradients)), gradients)
    )


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, whose state stays as it is where its update is called with `finite` = False.

    The direction is that of the moments so kept. Were they selected after it was made, it would need the moments before
    the step too, and XLA:CPU would copy both: two thirds more time for the whole update.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, finite: ArrayLike = True, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        new = keep_unless(finite, state, optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu))
        mu, nu = (optax.tree.bias_correction(m, b, new.count) for m, b in ((new.mu, b1), (new.nu, b2)))
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), new

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def keep_unless(finite: ArrayLike, old: Any, new: Any) -> Any:
    """The new tree, or the old one where `finite`, a bool scalar, is False.

    A choice for each element, since the operands of a condition would have to be stored, gradients in float32.
    """
    return jax.tree.map(lambda a, b: jnp.where(finite, b, a), old, new)
