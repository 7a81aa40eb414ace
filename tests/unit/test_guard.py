"""Decisions of the guard, their reasons, and its state in a checkpoint."""

import json
import statistics

import numpy as np
import pytest

from acpo_dist.config.guard import GuardConfig, Limits
from acpo_dist.core.types import Normaliser
from acpo_dist.training.guard.guard import Guard
from acpo_dist.training.guard.signals import Reference, Signals, fit_reference, measure_signals
from tests.helpers.config import refusal

FAST = GuardConfig(action="stop", warmup=0, patience=1, smoothing=1.0, cooldown=3)
"""Acts on a single iteration, so that tests can select it."""


def judged(judge: float, reward: float = 0.0) -> Signals:
    return Signals(reward_gains={"metric": reward}, judge_gains={"held out": judge})


def with_(config: GuardConfig, **changes) -> GuardConfig:
    return GuardConfig.model_validate({**config.model_dump(), **changes})


# Signals


def test_gains_are_mean_normalised_scores_with_the_metrics_own_sign():
    signals = measure_signals(
        train=["up"], judges=["down"],
        scores={"up": {"a": 3.0, "b": 5.0}, "down": {"b": 10.0, "a": 30.0}},
        normalisers={
            "up": Normaliser(mean=2.0, std=0.5, sign=1), "down": Normaliser(mean=10.0, std=20.0, sign=-1),
        },
        content={}, reference=Reference(content_mean={}, content_std={}),
    )  # fmt: skip
    assert signals.reward_gains == {"up": 4.0} and signals.judge_gains == {"down": -0.5}


def test_content_shifts_are_in_base_deviations_and_never_in_vanishing_ones():
    spread, constant = [0.1, 0.3, 0.5, 0.7], [0.2] * 4
    reference = fit_reference({"edges": spread, "dark": constant}, diversity=None, min_std=0.05)
    signals = measure_signals(
        train=[], judges=[], scores={}, normalisers={}, content={"edges": [0.6, 0.8], "dark": [0.3, 0.3]},
        reference=reference,
    )  # fmt: skip
    assert signals.content_shifts["edges"] == pytest.approx(0.3 / statistics.pstdev(spread))
    assert signals.content_shifts["dark"] == pytest.approx(0.1 / 0.05)


def test_ratios_are_left_out_where_either_side_is_unknown():
    reference = fit_reference({}, diversity=4.0, min_std=0.05)
    signals = measure_signals(
        train=[], judges=[], scores={}, normalisers={}, content={}, reference=reference, diversity=3.0,
        drift_rms=0.1, drift_budget=None,
    )  # fmt: skip
    assert (signals.diversity, signals.drift) == (0.75, None)
    assert signals.flat() == {"diversity": 0.75}


def test_a_reference_survives_json():
    reference = fit_reference({"edges": [0.1, 0.2, 1 / 3]}, diversity=0.7, min_std=0.01)
    assert Reference(**json.loads(json.dumps(reference.to_mapping()))) == reference


# Rules on signals


@pytest.mark.parametrize(
    ("signals", "rule"),
    [
        (judged(-0.7, reward=-0.7), "judge_below_base/held out"),
        (judged(1.0, reward=2.5), "hacking_gap"),
        (Signals(content_shifts={"dark_share": -2.0, "contrast": 0.1}), "content_shift/dark_share"),
        (Signals(diversity=0.3), "diversity_lost"),
        (Signals(drift=1.3), "drift"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_fault_stops_by_its_own_rule(signals: Signals, rule: str):
    decision = Guard(FAST).update(0, signals)
    assert decision.action == "stop" and decision.ends
    assert [reason.rule for reason in decision.reasons] == [rule] and decision.raised == (rule,)


@pytest.mark.parametrize(
    "signals",
    [judged(2.0, reward=2.5), Signals(diversity=1.5, drift=0.9), Signals()],
    ids=["honest gain", "more diverse", "nothing measured"],
)
def test_signals_within_all_limits_cause_no_action(signals: Signals):
    decision = Guard(FAST).update(0, signals)
    assert decision.action == "none" and not decision.reasons and not decision.ends


def test_a_judge_that_falls_from_its_best_stops_the_run_though_it_is_above_the_base_model():
    guard = Guard(FAST)
    assert [guard.update(i, judged(j, reward=j)).action for i, j in enumerate([0.3, 1.3, 0.9])] == ["none"] * 3
    decision = guard.update(3, judged(0.45, reward=0.45))
    assert decision.action == "stop" and decision.reasons[0].rule == "judge_fall/held out"
    assert decision.reasons[0].value == pytest.approx(0.85)


def test_the_best_of_a_judge_is_not_taken_from_the_warmup():
    guard = Guard(with_(FAST, warmup=2))
    for iteration, judge in enumerate([1.3, 1.3, 0.2]):
        decision = guard.update(iteration, judged(judge, reward=judge))
    assert decision.metrics["judge_fall/held out"] == 0 and decision.action == "none"


def test_rules_of_one_of_several_judges_are_enough():
    decision = Guard(FAST).update(0, Signals(judge_gains={"first": 1.0, "second": -1.0}))
    assert [reason.rule for reason in decision.reasons] == ["judge_below_base/second"]


def test_a_rule_that_is_switched_off_is_not_even_reported():
    decision = Guard(with_(FAST, drift=None)).update(0, Signals(drift=9.0))
    assert decision.action == "none" and "drift" not in decision.metrics and "guard/drift" not in decision.to_metrics()


def test_values_of_few_samples_do_not_count_during_the_warmup():
    guard = Guard(with_(FAST, warmup=3))
    assert [guard.update(i, Signals(diversity=0.1)).action for i in range(4)] == ["none", "none", "none", "stop"]


def test_drift_counts_from_the_first_check_on():
    assert Guard(with_(FAST, warmup=3)).update(0, Signals(drift=5.0)).action == "stop"


def test_gross_drift_stops_at_its_first_check_and_is_reported_unsmoothed():
    guard = Guard(GuardConfig(action="roll_back"))
    assert guard.update(0, Signals(drift=0.5)).action == "none"
    decision = guard.update(1, Signals(drift=2.7))
    assert decision.action == "roll_back" and decision.raised == ("drift",)
    assert decision.text.startswith("drift is 2.70 times its budget") and decision.metrics["drift"] == 2.7


def test_a_noisy_value_must_be_gross_in_two_consecutive_checks():
    guard = Guard(GuardConfig(action="stop"))
    judges = [-1.3, 0.0, -1.3, 0.0, -1.3, -1.3]
    actions = [guard.update(i, judged(j, reward=j)).action for i, j in enumerate(judges)]
    assert actions == ["none"] * 5 + ["stop"]


@pytest.mark.parametrize(
    "changes",
    [{"gross": None}, {"drift": {"warn": 1.0, "stop": None}}],
    ids=["switched off", "a rule that only warns"],
)
def test_without_a_gross_line_patience_is_kept(changes: dict):
    guard = Guard(with_(GuardConfig(action="stop"), **changes))
    assert guard.update(0, Signals(drift=9.0)).action == "none"


def test_drift_is_not_smoothed_and_stops_at_the_second_check_over_its_limit():
    guard = Guard(GuardConfig(action="stop"))
    actions = [guard.update(i, Signals(drift=d)).action for i, d in enumerate([0.1, 0.1, 1.3, 0.9, 1.3, 1.3])]
    assert actions == ["none"] * 5 + ["stop"]


def test_nothing_is_gross_in_the_cooldown_after_a_lowering():
    guard = Guard(GuardConfig(action="lower_reward", cooldown=4))
    actions = [guard.update(i, Signals(drift=5.0)).action for i in range(6)]
    assert actions == ["lower_reward", *["none"] * 4, "lower_reward"]


def test_the_reason_names_the_value_and_both_limits():
    decision = Guard(FAST).update(0, judged(-0.7, reward=-0.7))
    assert decision.text == (
        "judge `held out` is 0.70 base standard deviations below the base model (warns at 0.45, stop at 0.6)"
    )


def test_metrics_are_shares_of_the_stop_limit():
    metrics = Guard(with_(FAST, diversity_lost=Limits(warn=0.5).model_dump())).update(
        0, Signals(drift=0.6, diversity=0.75)
    )
    assert metrics.to_metrics() == {
        "guard/drift": pytest.approx(0.5), "guard/diversity_lost": pytest.approx(0.5), "guard/reward_scale": 1.0,
        "guard/best_iteration": 0.0,
    }  # fmt: skip


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="drift"):
        Guard(FAST).update(0, Signals(drift=float("nan")))


def test_an_iteration_is_counted_once():
    guard = Guard(FAST)
    guard.update(4, judged(0.0))
    with pytest.raises(ValueError, match="iteration 4"):
        guard.update(4, judged(0.0))


# Actions


@pytest.mark.parametrize(
    ("action", "wanted"), [("none", "none"), ("warn", "warn"), ("stop", "stop"), ("roll_back",) * 2]
)
def test_a_rule_over_its_stop_limit_does_what_is_configured(action: str, wanted: str):
    decision = Guard(with_(FAST, action=action)).update(0, Signals(drift=2.0))
    assert decision.action == wanted and decision.ends == (wanted in ("stop", "roll_back"))


def test_a_rule_over_its_warn_limit_only_warns_and_is_raised_once():
    guard = Guard(FAST)
    first, second = (guard.update(iteration, Signals(drift=1.1)) for iteration in range(2))
    assert first.action == second.action == "warn" and not first.ends
    assert first.raised == ("drift",) and second.raised == ()
    assert second.reasons


def test_lowering_the_reward_waits_for_its_effect_and_ends_in_a_stop():
    guard = Guard(with_(FAST, action="lower_reward", max_lowered=2))
    decisions = [guard.update(iteration, Signals(drift=2.0)) for iteration in range(9)]
    actions = [decision.action for decision in decisions]
    assert actions == ["lower_reward", *["none"] * 3, "lower_reward", *["none"] * 3, "stop"]
    assert [decisions[index].reward_scale for index in (0, 3, 4, 8)] == [0.5, 0.5, 0.25, 0.25]
    assert decisions[0].reasons[0].rule == "drift"


def test_a_run_with_lowered_reward_that_recovers_continues():
    guard = Guard(with_(FAST, action="lower_reward"))
    guard.update(0, Signals(drift=2.0))
    assert {guard.update(iteration, Signals(drift=0.5)).action for iteration in range(1, 20)} == {"none"}
    assert guard.reward_scale == 0.5


# The best checkpoint


def test_the_best_checkpoint_is_the_one_whose_worst_judge_was_best():
    guard = Guard(FAST)
    gains = {10: (0.5, 0.4), 20: (1.5, 0.3), 30: (0.45, 0.6), 40: (0.5, 0.44)}
    best = []
    for iteration, (first, second) in gains.items():
        guard.saved(iteration, {"first": first, "second": second})
        best.append(guard.best_iteration)
    assert best == [10, 10, 30, 30]


def test_the_base_model_is_best_until_a_checkpoint_is_at_least_as_good():
    guard = Guard(FAST)
    guard.saved(10, {"judge": -0.1})
    assert guard.best_iteration == 0
    guard.saved(20, {"judge": 0.0})
    assert guard.best_iteration == 20


def test_without_a_measurement_the_running_means_judge_a_checkpoint():
    guard = Guard(FAST)
    guard.update(0, judged(0.4))
    guard.saved(1)
    guard.update(1, judged(0.2))
    guard.saved(2)
    assert guard.best_iteration == 1


def test_a_checkpoint_of_a_hacked_run_is_never_the_best():
    guard = Guard(with_(FAST, action="roll_back"))
    guard.saved(5, {"held out": 0.1})
    decision = guard.update(5, judged(1.0, reward=3.0))
    guard.saved(6, {"held out": 1.0})
    assert decision.action == "roll_back" and decision.best_iteration == guard.best_iteration == 5


# Resume


@pytest.mark.parametrize("cut", [1, 7, 30, 58])
def test_a_guard_restored_from_json_decides_as_if_it_had_never_stopped(cut: int):
    rng = np.random.default_rng(0)
    config = GuardConfig(action="lower_reward", cooldown=4, max_lowered=5)
    run = [
        Signals(
            reward_gains={"metric": 0.03 * i + rng.normal(0, 0.2)}, judge_gains={"held out": rng.normal(0, 0.3)},
            content_shifts={"contrast": rng.normal(0, 0.5)}, diversity=rng.uniform(0.5, 1), drift=rng.uniform(0.7, 1.3),
        )
        for i in range(80)
    ]  # fmt: skip

    def go(guard: Guard, start: int, end: int) -> tuple[Guard, list]:
        decisions = []
        for iteration in range(start, end):
            decisions.append(guard.update(iteration, run[iteration]))
            if iteration % 5 == 4:
                guard.saved(iteration + 1)
        return guard, decisions

    _, whole = go(Guard(config), 0, 80)
    guard, first = go(Guard(config), 0, cut)
    _, second = go(Guard.restore(config, json.loads(json.dumps(guard.state()))), cut, 80)
    assert first + second == whole
    # The run does something before and after the cut.
    assert {decision.action for decision in whole} >= {"none", "warn", "lower_reward"}


def test_a_configuration_that_sets_the_removed_recall_rule_is_refused_with_the_reason(smallest):
    assert "`guard.recall_lost` was removed" in refusal(smallest, "guard.recall_lost=null")
    assert "`vrg.guidance` was removed" in refusal(smallest, "vrg.guidance=true")
