"""Optimisers and learning-rate schedules, on Optax.

The transformations leave out the learning rate: the train step multiplies it in, by the step it is at, so that a step
skipped for its gradients still moves the schedule.
"""

import jax
import jax.numpy as jnp
import optax

from jmoe import config
from jmoe.optim.muon import scale_by_muon
from jmoe.optim.roles import factor
from jmoe.sharding import is_variable, logical_axes


def schedule(optim: config.Optimiser, steps: int) -> optax.Schedule:
    """The learning rate of each step 0 .. steps-1, as a function of an int32 scalar."""
    peak, warmup = optim.learning_rate, optim.schedule.warmup_steps
    match optim.schedule:
        case config.Constant():
            main = optax.constant_schedule(peak)
        case config.Cosine(final=final):
            main = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=final)
        case config.WSD(decay_fraction=fraction, shape=shape, final=final):
            decay = min(max(1, round(fraction * steps)), max(1, steps - warmup))

            def tail(step):
                done = jnp.clip(step / decay, 0.0, 1.0)
                left = 1.0 - jnp.sqrt(done) if shape == "1-sqrt" else 1.0 - done
                return peak * (final + (1.0 - final) * left)

            main = optax.join_schedules([optax.constant_schedule(peak), tail], [steps - warmup - decay])
    # The first step already moves: 1/(warmup+1) of the peak.
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), main], [warmup])


def transformation(optim: config.Optimiser) -> optax.GradientTransformation:
    """Clipping, the rule's direction, decoupled weight decay, factors by role; the learning rate is left to the
    caller."""
    muon = isinstance(optim, config.Muon)
    rule = scale_by_muon(optim) if muon else optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), rule, _decay_and_factors(optim))


def _decay_and_factors(optim: config.Optimiser) -> optax.GradientTransformation:
    """(direction + weight decay · parameter) · factor, both by the parameter's role."""

    def of(direction, parameter):
        axes = logical_axes(parameter)
        decay, rate = optim.weight_decay * factor(optim.decays, axes), factor(optim.learning_rates, axes)
        new = direction[...] + decay * parameter[...] if decay else direction[...]
        return direction.replace(new if rate == 1.0 else rate * new)

    return optax.stateless(lambda directions, params: jax.tree.map(of, directions, params, is_leaf=is_variable))
