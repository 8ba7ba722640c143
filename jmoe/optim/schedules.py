"""Learning-rate schedules, on Optax: a linear warm-up, then constant, a cosine, or stable and decay."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jmoe import config


def schedule(optim: config.Optimiser, steps: int) -> optax.Schedule:
    """The learning rate of each step 0 .. steps-1, as a function of an int32 scalar."""
    peak, warmup = optim.learning_rate, optim.schedule.warmup_steps
    match optim.schedule:
        case config.Constant():
            main = optax.constant_schedule(peak)
        case config.Cosine(final=final):
            main = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=final)
        case config.WSD() as wsd:
            start = wsd.decay_begins(steps)
            length = max(1, steps - start)
            main = optax.join_schedules(
                [optax.constant_schedule(peak), lambda step: peak * tail(wsd, jnp.clip(step / length, 0.0, 1.0))],
                [start - warmup],
            )
    # The first step already moves: 1/(warmup+1) of the peak.
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), main], [warmup])


def tail(wsd: config.WSD, done: Float[Array, ""]) -> Float[Array, ""]:
    """Learning rate over peak when the share `done` of the decay is over, from 1 down to `wsd.final`.

    MiniCPM's exponential decay 0.5^((s − S)/T) (arXiv 2404.06395, §4) reaches `final` at the end of a decay of
    T·log2(1/final) steps: its half-life follows from the length, which the other shapes are given by too.
    """
    match wsd.shape:
        case "linear":
            left = 1.0 - done
        case "1-sqrt":
            left = 1.0 - jnp.sqrt(done)
        case "exponential":
            return wsd.final**done
    return wsd.final + (1.0 - wsd.final) * left
