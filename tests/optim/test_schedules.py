"""Learning-rate schedules."""

import dataclasses
import math

import numpy as np
import pytest

from jmoe import config, optim

STEPS = 100


def rates(schedule):
    rate = optim.schedule(config.AdamW(learning_rate=2.0, schedule=schedule), STEPS)
    return np.array([float(rate(step)) for step in range(STEPS)])


def test_warm_up_rises_linearly_and_starts_above_zero():
    np.testing.assert_allclose(
        rates(config.Constant(warmup_steps=9))[:12], [*(2.0 * np.arange(1, 11) / 10), 2.0, 2.0], 1e-6
    )
    assert (rates(config.Constant(warmup_steps=0)) == 2.0).all()


def test_cosine_falls_to_its_final_share():
    got = rates(config.Cosine(warmup_steps=20, final=0.1))
    expected = [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (s - 20) / 80)) / 2) for s in range(20, STEPS)]
    np.testing.assert_allclose(got[20:], expected, rtol=1e-5)


TAILS = {
    "linear": lambda x: 0.05 + 0.95 * (1 - x),
    "1-sqrt": lambda x: 0.05 + 0.95 * (1 - math.sqrt(x)),
    "exponential": lambda x: 0.05**x,
}


@pytest.mark.parametrize("when", [{"decay_fraction": 0.2}, {"decay_start": 80}])
@pytest.mark.parametrize("shape", TAILS)
def test_wsd_is_flat_and_then_decays(shape, when):
    got = rates(config.WSD(warmup_steps=10, shape=shape, final=0.05, **when))
    np.testing.assert_allclose(got[10:80], 2.0)
    np.testing.assert_allclose(got[80:], [2.0 * TAILS[shape](i / 20) for i in range(20)], rtol=1e-5)


def test_the_exponential_decay_halves_at_equal_intervals():
    """MiniCPM's 0.5^((s − S)/T) with T = 4, over 20 steps."""
    got = rates(config.WSD(decay_start=80, shape="exponential", final=0.5 ** (20 / 4)))
    np.testing.assert_allclose(got[80:], [2.0 * 0.5 ** (s / 4) for s in range(20)], rtol=1e-5)


def test_a_decay_that_would_begin_in_the_warm_up_begins_at_its_end():
    got = rates(config.WSD(warmup_steps=60, decay_fraction=0.9, shape="linear"))
    np.testing.assert_allclose(got[60:], [2.0 * (1 - i / 40) for i in range(40)], rtol=1e-5)


def test_an_exponential_decay_to_zero_is_refused():
    with pytest.raises(config.InputError, match="final is 0, which an exponential decay never reaches; give"):
        config.WSD(shape="exponential")


def test_warm_up_as_long_as_the_run_is_allowed():
    for schedule in (config.Cosine(STEPS), config.WSD(STEPS), config.Constant(STEPS)):
        assert np.isfinite(rates(schedule)).all()


def test_every_schedule_of_the_config_is_known():
    """A kind added to the config without its arithmetic fails here, not in a run."""
    for kind in config.Schedule.__args__:
        assert optim.schedule(dataclasses.replace(config.AdamW(), schedule=kind()), 200)(0) > 0
