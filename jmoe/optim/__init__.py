"""Optimisers and learning-rate schedules, on Optax.

The transformations leave out the learning rate: the train step multiplies it in, by the step it is at, so that a step
skipped for its gradients still moves the schedule.
"""

import jax
import optax

from jmoe import config
from jmoe.optim.adam import clip, scale_by_adam
from jmoe.optim.muon import scale_by_muon
from jmoe.optim.roles import factor
from jmoe.optim.schedules import schedule as schedule
from jmoe.sharding import is_variable, logical_axes


def transformation(optim: config.Optimiser) -> optax.GradientTransformationExtraArgs:
    """Clipping, the rule's direction, decoupled weight decay, factors by role; the learning rate is left to the
    caller.

    Its update also takes `finite`, a bool scalar: where that is False the state stays as it is, and what it returns for
    the parameters is not to be used.
    """
    muon = isinstance(optim, config.Muon)
    rule = scale_by_muon(optim) if muon else scale_by_adam(optim.b1, optim.b2, optim.eps)
    return optax.with_extra_args_support(optax.chain(clip(optim.clip_norm), rule, _decay_and_factors(optim)))


def _decay_and_factors(optim: config.Optimiser) -> optax.GradientTransformation:
    """(direction + weight decay · parameter) · factor, both by the parameter's role."""

    def of(direction, parameter):
        axes = logical_axes(parameter)
        decay, rate = optim.weight_decay * factor(optim.decays, axes), factor(optim.learning_rates, axes)
        new = direction[...] + decay * parameter[...] if decay else direction[...]
        return direction.replace(new if rate == 1.0 else rate * new)

    return optax.stateless(lambda directions, params: jax.tree.map(of, directions, params, is_leaf=is_variable))
