"""The arithmetic of the comparison of optimisers, without training."""

import json
import math

import jax
import numpy as np
import pytest

from benchmarks import sample_efficiency as module
from benchmarks.sample_efficiency import Run, Store, bracket, interval, log_ratio, summary, tokens_to
from jmoe import config, training
from jmoe.sharding import make_mesh

TOKENS = (1000, 2000, 4000)
SETTINGS = module.SMOKE["smoke"].settings("AdamW", 0)


def run(optimiser="AdamW", seed=0, efficiency=1.0, noise=0.0, **changes):
    """Of loss 10 − log(efficiency · tokens)."""
    losses = tuple(10 + noise - math.log(efficiency * tokens) for tokens in TOKENS)
    given = {
        "size": "small",
        "flops_per_token": 1.0,
        "learning_rate": 1e-3,
        "settings": SETTINGS,
        "plan": (0.5,),
        "tokens": TOKENS,
        "losses": losses,
    } | changes
    return Run(optimiser=optimiser, seed=seed, **given)


def test_tokens_to_a_loss_are_read_between_the_ends_of_decays():
    assert tokens_to(10 - math.log(2500), run()) == pytest.approx(2500)
    assert tokens_to(10.0, run()) == pytest.approx(1000)  # lower from the first on: an upper bound


@pytest.mark.parametrize("efficiency", [1.0, 1.7, 3.9, 0.6])
def test_a_ratio_is_that_of_the_efficiencies(efficiency):
    """Whichever of the two is the better one: nothing is extrapolated."""
    assert math.exp(log_ratio(run("Muon", efficiency=efficiency), run())) == pytest.approx(1 / efficiency)


def test_what_lies_before_the_first_decay_is_told_to_be_a_bound():
    assert not module.is_bound(run("Muon", efficiency=3.9), run())
    muon = [run("Muon", seed, efficiency=5.0) for seed in range(2)]
    assert module.is_bound(muon[0], run()) and module.is_bound(run(), muon[0])
    figure, *_ = summary({"small": [(own, run(seed=own.seed)) for own in muon]}, {"small": 1.0})
    assert figure.name.startswith("small: tokens to equal loss, at most [") and figure.value == pytest.approx(0.25)


def test_an_interval_is_students():
    from scipy import stats

    values = [0.1, 0.2, 0.4]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(np.log(interval([values])), [np.mean(values), low, high])
    # Groups apart, alike within: the spread between them does not count.
    mean, low, high = interval([[0.0, 0.0], [1.0, 1.0]])
    assert (math.log(mean), math.log(low), math.log(high)) == (0.5, 0.5, 0.5)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [low <= 1 <= high for _, low, high in (interval(rng.normal(size=(3, 3))) for _ in range(2000))]
    assert 0.93 < np.mean(covered) < 0.97


def test_a_sweep_goes_on_until_the_best_rate_lies_within():
    tried = []

    def loss(optimum):
        def at(rate):
            tried.append(rate)
            return abs(math.log(rate / optimum))

        return at

    assert bracket(loss(4e-3), (2e-3, 4e-3, 8e-3)) == 4e-3 and len(tried) == 3
    assert bracket(loss(5e-4), (2e-3, 4e-3, 8e-3)) == pytest.approx(5e-4)
    assert bracket(loss(3e-2), (2e-3, 4e-3, 8e-3)) == pytest.approx(3.2e-2)
    assert bracket(lambda rate: math.inf if rate > 1e-3 else rate**-1, (2e-3, 4e-3, 8e-3)) == pytest.approx(1e-3)
    with pytest.raises(RuntimeError, match="falls on and on"):
        bracket(lambda rate: rate, (2e-3, 4e-3, 8e-3))


def test_the_summary_counts_flops_and_seconds():
    pairs = {
        size: [
            (run("Muon", seed, 2.0, 0.01 * seed, flops_per_token=1.1, size=size), run(seed=seed, noise=0.01 * seed))
            for seed in range(3)
        ]
        for size in ("small", "large")
    }
    figures = summary(pairs, {"small": 1.2, "large": 1.5})
    values = {figure.name.split(" [")[0]: figure.value for figure in figures}
    assert values["small: tokens to equal loss"] == pytest.approx(0.5)
    assert values["all sizes: flops to equal loss"] == pytest.approx(0.55)
    assert values["large: seconds to equal loss"] == pytest.approx(0.75)
    assert values["all sizes: upper bound of the FLOP ratio"] == pytest.approx(0.55)


def test_finished_runs_are_not_run_again_and_a_torn_line_is(tmp_path):
    class Trainer:
        def __init__(self):
            self.ran = []

        def blank(self, rate, seed):
            return Run("small", "AdamW", rate, seed, SETTINGS, (0.5,))

        def run(self, rate, seed):
            self.ran.append(rate)
            return run(learning_rate=rate, seed=seed) if rate != 1 else run(losses=(1.0, math.inf), learning_rate=1.0)

    trainer, path = Trainer(), tmp_path / "results" / "runs.jsonl"
    first = [Store(path).get(trainer, rate, 0) for rate in (0.5, 1.0, 0.5)]  # pyright: ignore[reportArgumentType]
    assert trainer.ran == [0.5, 1.0] and first[0].losses == first[2].losses and first[1].losses[-1] == math.inf
    whole = path.read_text()
    path.write_text(whole[:-5])
    store = Store(path)
    assert path.read_text() == whole[: whole.index("\n") + 1]
    store.get(trainer, 1.0, 0)  # pyright: ignore[reportArgumentType]
    assert trainer.ran == [0.5, 1.0, 1.0] and path.read_text() == whole
    assert [json.loads(line)["learning_rate"] for line in whole.splitlines()] == [0.5, 1.0]


def test_the_iteration_is_counted_for_every_matrix():
    settings = module.SMOKE["smoke"].settings("Muon", 0)
    params = training.abstract_state(settings, make_mesh(config.Mesh(), jax.devices()[:1])).params
    squares = 4 + 3 * 8  # 32 x 32: of attention, of 8 experts; and the router, 32 x 8
    expected = 5 * (squares * 6 * 32**3 + 4 * 8 * 8 * 32 + 2 * 8**3)
    assert module.iteration_flops(settings.optim, params) == expected
    assert module.iteration_flops(config.AdamW(), params) == 0


def test_every_size_can_be():
    for size in (*module.SIZES.values(), *module.SMOKE.values()):
        settings = size.settings("AdamW", 1)
        assert isinstance(settings.optim, config.AdamW) and settings.seed == 1
        assert 0 < settings.optim.schedule.warmup_steps < module.BUDGETS[0] * (1 - module.DECAY) * size.steps
