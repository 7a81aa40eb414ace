"""The guard does not react to noise, detects faults in time, and its rules do not flicker."""

import numpy as np
import pytest

from acpo_dist.config.guard import GuardConfig, Limits
from acpo_dist.training.guard.guard import Guard
from acpo_dist.training.guard.rules import RuleState, RunningMean, step, step_gross
from acpo_dist.training.guard.signals import Signals

SAMPLES, CALIBRATION = 32, 64
"""Samples of one iteration and of calibration, as in configs/toy_sdxl.yaml."""
STATISTICS = 6
CORRELATION = 0.8
"""Correlation of reward and judge over base samples."""
STOPPING = GuardConfig(action="stop")
"""The shipped limits."""


class NoisyRun:
    """Signals of an unchanged policy: means of 32 samples, relative to means of 64 others."""

    def __init__(self, seed: int, length: int = 500) -> None:
        rng = np.random.default_rng(seed)

        def means(samples: int, rows: int) -> np.ndarray:
            z = rng.standard_normal((rows, 2 + STATISTICS)) / samples**0.5
            z[:, 1] = CORRELATION * z[:, 0] + (1 - CORRELATION**2) ** 0.5 * z[:, 1]
            return z

        self.z = (means(SAMPLES, length) - means(CALIBRATION, 1)).tolist()
        # Ratios of the toy's base model scatter by so much, a held budget by 5 %.
        self.ratios = (1 + rng.standard_normal((length, 2)) * [0.06, 0.05]).tolist()

    def at(
        self, iteration: int, *, judge: float = 0.0, reward: float = 0.0, content: float = 0.0, drift: float = 0.8
    ) -> Signals:
        z, (diversity, budget) = self.z[iteration], self.ratios[iteration]
        return Signals(
            reward_gains={"metric": z[0] + reward},
            judge_gains={"held out": z[1] + judge},
            content_shifts={f"statistic {index}": value + content for index, value in enumerate(z[2:])},
            diversity=diversity, drift=drift * budget,
        )  # fmt: skip


# No stop in 400 runs bounds the rate by 0.75 % with 95 % confidence; 40 show that the limits are of the right size.
many_runs = pytest.mark.parametrize("runs", [40, pytest.param(400, marks=pytest.mark.slow)])
# Runs with a fault, each of which is stopped: fewer are enough.
faulty_runs = pytest.mark.parametrize("runs", [40, pytest.param(100, marks=pytest.mark.slow)])


@many_runs
def test_fewer_than_one_in_a_hundred_runs_without_drift_is_stopped_in_500_iterations(runs: int):
    stopped, warned = 0, 0
    for seed in range(runs):
        guard, noise, warning = Guard(STOPPING), NoisyRun(seed), False
        for iteration in range(500):
            decision = guard.update(iteration, noise.at(iteration))
            warning |= decision.action == "warn"
            if decision.ends:
                stopped += 1
                break
        warned += warning
    assert stopped == 0
    assert warned / runs < 0.1


@faulty_runs
@pytest.mark.parametrize(
    ("fault", "within"),
    [({"judge": -1.0}, 9), ({"reward": 1.0, "judge": -0.5}, 8), ({"content": 2.0}, 9), ({"drift": 1.6}, 2)],
    ids=["judge falls by one sigma", "the gap opens", "images change", "drift doubles"],
)
def test_a_fault_is_detected_within_the_stated_iterations(fault: dict[str, float], within: int, runs: int):
    delays = []
    for seed in range(runs):
        guard, noise, begin = Guard(STOPPING), NoisyRun(seed), 50
        for iteration in range(begin + 60):
            if guard.update(iteration, noise.at(iteration, **fault if iteration >= begin else {})).ends:
                delays.append(iteration - begin + 1)
                break
    assert len(delays) == runs
    assert min(delays) > 0 and np.quantile(delays, 0.95) <= within


@faulty_runs
@pytest.mark.parametrize(
    ("fault", "within"),
    [({"judge": -2.5}, 2), ({"reward": 3.0}, 2), ({"content": 5.0}, 2), ({"drift": 3.5}, 1)],
    ids=["judge falls by 2.5 sigmas", "the gap opens wide", "other images", "drift 2.8 times its budget"],
)
@pytest.mark.parametrize("begin", [0, 50], ids=["in the warm-up", "later"])
def test_a_gross_fault_is_detected_at_once(fault: dict[str, float], within: int, begin: int, runs: int):
    for seed in range(runs):
        guard, noise = Guard(STOPPING), NoisyRun(seed, length=begin + within)
        ends = [
            guard.update(iteration, noise.at(iteration, **fault if iteration >= begin else {})).ends
            for iteration in range(begin + within)
        ]
        assert ends == [False] * (begin + within - 1) + [True]


@many_runs
def test_single_iterations_of_few_samples_do_not_make_a_false_stop_either(runs: int):
    # Eight samples: a single mean lies over 3 of its standard deviations beyond the line once in a thousand checks.
    rng = np.random.default_rng(0)
    stopped = {2.0: 0, None: 0}
    for _ in range(runs):
        # Correlated metrics, relative to the means of 64 calibration samples, as in NoisyRun.
        z = rng.standard_normal((500, 2)) / 8**0.5 - rng.standard_normal(2) / CALIBRATION**0.5
        judge = (CORRELATION * z[:, 0] + (1 - CORRELATION**2) ** 0.5 * z[:, 1]).tolist()
        for gross in stopped:
            guard = Guard(GuardConfig(action="stop", gross=gross))
            stopped[gross] += any(
                guard.update(i, Signals(reward_gains={"r": float(z[i, 0])}, judge_gains={"j": judge[i]})).ends
                for i in range(500)
            )
    assert stopped[2.0] - stopped[None] <= 1, "gross limits add nothing to what running means report"


def test_weights_of_a_running_mean_sum_to_one():
    mean = RunningMean()
    values = [3.0, -1.0, 4.0, 1.0, -5.0]
    for count, value in enumerate(values, 1):
        mean = mean.add(value, 0.3)
        weights = [0.3 * 0.7 ** (count - 1 - index) for index in range(count)]
        wanted = sum(w * v for w, v in zip(weights, values[:count], strict=True)) / sum(weights)
        assert mean.value == pytest.approx(wanted, rel=1e-12)


def levels(metrics: list[float], *, patience: int = 2, release: float = 0.5) -> list[str]:
    state, seen = RuleState(), []
    for figure in metrics:
        state = step(state, figure, Limits(warn=1.0, stop=2.0), patience=patience, release=release)
        seen.append(state.level)
    return seen


def test_a_rule_rises_only_after_its_patience():
    assert levels([1.5, 0.9, 1.5, 1.5, 2.5, 1.5, 2.5, 2.5]) == [
        "ok",
        "ok",
        "ok",
        "warn",
        "warn",
        "warn",
        "warn",
        "stop",
    ]


def test_a_rule_falls_back_only_under_its_release():
    assert levels([1.5, 1.5, 0.9, 0.5, 0.9, 0.49, 0.9, 1.5]) == ["ok", "warn", "warn", "warn", "warn", "ok", "ok", "ok"]


def test_a_value_over_both_limits_raises_the_rule_directly_to_stop():
    assert levels([3.0, 3.0]) == ["ok", "stop"]


def test_a_gross_value_stops_after_its_own_patience_and_is_counted_separately():
    state, seen = RuleState(), []
    for figure in (5.0, 3.9, 4.0, 4.0, 1.0):
        state = step_gross(state, figure, 4.0, patience=2)
        seen.append((state.level, state.over_gross, state.over_stop))
    assert seen == [("ok", 1, 0), ("ok", 0, 0), ("ok", 1, 0), ("stop", 2, 0), ("stop", 0, 0)]


def test_a_rule_without_a_stop_limit_only_warns():
    state = RuleState()
    for _ in range(20):
        state = step(state, 99.0, Limits(warn=1.0), patience=2, release=0.5)
    assert state.level == "warn"


def test_a_stop_limit_below_the_warn_limit_is_refused():
    with pytest.raises(ValueError, match="must not be below"):
        Limits(warn=1.0, stop=0.5)
