"""Paired comparisons: intervals have their nominal coverage, resample prompts, and agree with scipy."""

import numpy as np
import pytest
from scipy import stats

from acpo_dist.evaluation.metrics.distances import SampleError
from acpo_dist.evaluation.metrics.paired import bootstrap_mean, compare_paired, prompt_means, sign_flip_test

PROMPTS, PER_PROMPT = 40, 6


def world(seed: int, effect: float = 0.3) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Skewed differences with most of their variance between prompts, with mean `effect`."""
    rng = np.random.default_rng(seed)
    prompt_effect = rng.gamma(2.0, 0.7, PROMPTS) - 1.4
    base = rng.normal(5, 2, PROMPTS * PER_PROMPT)
    tuned = base + effect + np.repeat(prompt_effect, PER_PROMPT) + rng.normal(0, 0.5, PROMPTS * PER_PROMPT)
    return tuned, base, [f"prompt {index}" for index in range(PROMPTS) for _ in range(PER_PROMPT)]


@pytest.mark.parametrize(
    ("method", "least", "most"), [("studentized", 0.875, 0.925), ("bca", 0.845, 0.925), ("percentile", 0.845, 0.925)]
)
def test_intervals_over_prompts_have_their_nominal_coverage(method, least: float, most: float):
    hits, naive, worlds = 0, 0, 1000
    for seed in range(worlds):
        tuned, base, prompts = world(seed)
        units = prompt_means(tuned - base, prompts)
        interval = bootstrap_mean(units, confidence=0.9, resamples=600, seed=seed, method=method)
        hits += interval.low <= 0.3 <= interval.high
        # What happens when images are taken for independent.
        wrong = bootstrap_mean(tuned - base, confidence=0.9, resamples=600, seed=seed, method=method)
        naive += wrong.low <= 0.3 <= wrong.high
    # The standard error of a coverage is 0.0095. The plain bootstraps are known to be narrow with 40 skewed units.
    assert least <= hits / worlds <= most
    assert naive / worlds < 0.6


def test_the_bca_interval_agrees_with_scipys():
    units = np.random.default_rng(3).gamma(1.5, 1.0, 30)
    ours = bootstrap_mean(units, confidence=0.95, resamples=40_000, seed=0, method="bca")
    theirs = stats.bootstrap((units,), np.mean, n_resamples=40_000, method="BCa", rng=np.random.default_rng(1))
    # Monte Carlo error of a 2.5 % quantile from 40,000 resamples, of either.
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)
    plain = bootstrap_mean(units, confidence=0.95, resamples=40_000, seed=0, method="percentile")
    assert ours.high - plain.high > 0.02


def test_the_studentized_interval_of_many_normal_units_is_students():
    units = np.random.default_rng(5).normal(1, 2, 400)
    ours = bootstrap_mean(units, confidence=0.95, resamples=20_000, seed=0)
    wanted = stats.t.interval(0.95, 399, units.mean(), stats.sem(units))
    # Monte Carlo error of a 2.5 % quantile, times a standard error of 0.1.
    assert (ours.low, ours.high) == pytest.approx(wanted, abs=0.01)


def test_too_few_prompts_to_resample_get_students_interval_under_its_name():
    interval = bootstrap_mean(np.array([1.0, 3.0]), confidence=0.9, resamples=200, seed=0)
    assert interval.method == "t"
    assert (interval.low, interval.high) == pytest.approx(stats.t.interval(0.9, 1, 2.0, 1.0), rel=1e-9)


def test_every_prompt_counts_the_same_however_many_samples_it_has():
    result = compare_paired([1, 1, 1, 1, 5], [0, 0, 0, 0, 0], ["a", "a", "a", "a", "b"], resamples=200)
    assert result.difference.value == 3.0
    assert (result.num_prompts, result.num_samples) == (2, 5)


def test_a_tie_is_half_a_win():
    result = compare_paired([1, 2, 3, 0], [0, 2, 3, 1], ["a", "b", "c", "d"], resamples=200)
    assert result.win_rate.value == 0.5


def test_the_win_rate_interval_is_wilsons_and_has_width_when_every_prompt_is_won():
    result = compare_paired([1.0] * 12, [0.0] * 12, [str(index) for index in range(12)], resamples=200)
    wanted = stats.binomtest(12, 12).proportion_ci(method="wilson")
    assert (result.win_rate.low, result.win_rate.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    assert result.win_rate.low < 0.8


def test_few_prompts_get_the_exact_permutation_test():
    units = np.random.default_rng(0).normal(0.5, 1, 10)
    theirs = stats.permutation_test(
        (units, np.zeros(10)), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True
    )
    assert sign_flip_test(units, resamples=2000, seed=0) == pytest.approx(theirs.pvalue, rel=1e-9)


def test_many_prompts_get_a_sampled_permutation_test_that_is_near_the_t_test():
    units = np.random.default_rng(1).normal(0.25, 1, 60)
    # Both are near-exact for normal units; Monte Carlo error of 20,000 flips is under 0.003.
    wanted = stats.ttest_1samp(units, 0).pvalue
    assert sign_flip_test(units, resamples=20_000, seed=0) == pytest.approx(wanted, abs=0.01)


def test_no_difference_at_all_is_no_evidence():
    result = compare_paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], ["a", "b", "c"], resamples=200)
    assert result.p_value == 1.0 and (result.difference.low, result.difference.high) == (0.0, 0.0)


def test_a_comparison_follows_from_its_seed():
    tuned, base, prompts = world(0)
    first, again, other = (compare_paired(tuned, base, prompts, resamples=500, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.difference.low != other.difference.low
    assert first.to_mapping()["difference"]["confidence"] == 0.95


def test_scores_that_are_not_paired_are_refused():
    with pytest.raises(SampleError, match="found 2 tuned, 3 base, 2 prompts"):
        compare_paired([1, 2], [1, 2, 3], ["a", "b"])


def test_one_prompt_gives_no_interval():
    with pytest.raises(SampleError, match="at least two"):
        compare_paired([1, 2], [0, 0], ["a", "a"])
