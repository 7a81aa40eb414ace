"""Paired comparison of two models on the same prompts and seeds. Confidence intervals resample prompts, not images.

Samples of one prompt are correlated, so the prompt is the unit: differences are averaged per prompt first, and all
prompts have equal weight.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from acpo_dist.evaluation.metrics.distances import SampleError

Method = Literal["studentized", "bca", "percentile"]
_FEW = 8
_CHUNK = 1 << 22
"""Random numbers drawn at once; limits the memory that many prompts need."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float
    confidence: float
    method: str

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """A tuned model compared with a base model on the same seeds; positive differences favour the tuned model."""

    difference: Interval
    """Mean over prompts of the mean difference."""
    win_rate: Interval
    """Mean over prompts of the share of samples that are better; a tie counts as half a win."""
    p_value: float
    """p-value of the two-sided sign-flip permutation test over prompts, under the hypothesis of no difference."""
    num_prompts: int
    num_samples: int

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


def compare_paired(
    tuned: Sequence[float], base: Sequence[float], prompts: Sequence[str],
    *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0, method: Method = "studentized",
) -> PairedComparison:  # fmt: skip
    """Compare scores of samples with the same prompts and seeds, in the same order.

    Args:
        tuned: N scores; higher is better.
        base: N scores of the other model's samples.
        prompts: N prompts, or their ids.
        confidence: coverage of the intervals, in (0, 1).
        resamples: number of bootstrap resamples, and of random sign flips if the permutation test is not exact.
        seed: seed of the resamples.
        method: bootstrap method, see `bootstrap_mean`.

    Returns:
        Mean difference, win rate and p-value.

    Raises:
        SampleError: the counts differ, there are fewer than two prompts, or a score is not finite.
    """
    if not len(tuned) == len(base) == len(prompts):
        raise SampleError(
            f"paired scores need the same samples, found {len(tuned)} tuned, {len(base)} base, {len(prompts)} prompts"
        )
    difference = np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    means = prompt_means(difference, prompts)
    wins = prompt_means(np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5)), prompts)
    return PairedComparison(
        difference=bootstrap_mean(means, confidence=confidence, resamples=resamples, seed=seed, method=method),
        win_rate=_wilson(float(wins.mean()), len(wins), confidence),
        p_value=sign_flip_test(means, resamples=resamples, seed=seed),
        num_prompts=len(means), num_samples=len(difference),
    )  # fmt: skip


def prompt_means(values: NDArray[np.float64], prompts: Sequence[str]) -> NDArray[np.float64]:
    """Average the values of each prompt, in the order of each prompt's first occurrence."""
    position: dict[str, int] = {}
    owner = np.array([position.setdefault(prompt, len(position)) for prompt in prompts], dtype=np.int64)
    return np.bincount(owner, weights=values, minlength=len(position)) / np.bincount(owner, minlength=len(position))


def bootstrap_mean(
    units: NDArray[np.float64], *, confidence: float, resamples: int, seed: int, method: Method = "studentized"
) -> Interval:
    """Compute a bootstrap interval of the mean over independent units (prompts).

    Args:
        units: one number per prompt.
        confidence: coverage of the interval, in (0, 1).
        resamples: number of resamples, drawn with replacement.
        seed: seed of the resamples.
        method: `studentized` resamples the t-statistic and keeps its nominal coverage for few and skewed units (below 8
            units Student's interval is returned instead, named `t`); the coverage of `bca` and `percentile` is two to
            four points below 90 % with 40 skewed prompts.

    Returns:
        The mean with its interval.

    Raises:
        SampleError: fewer than two units, a non-finite unit, or an argument out of range.

    Source: Efron and Tibshirani 1993, chapters 12 (studentized) and 14 (BCa; the acceleration is the jackknife's).
    """
    units = np.asarray(units, dtype=np.float64)
    if len(units) < 2 or not np.isfinite(units).all():
        raise SampleError(f"an interval needs at least two finite units (prompts), found {len(units)}")
    if not 0 < confidence < 1 or resamples < 100 or method not in get_args(Method):
        raise SampleError(
            f"expected a confidence in (0, 1), at least 100 resamples and one of "
            f"{', '.join(get_args(Method))}, found {confidence}, {resamples} and `{method}`"
        )
    value = math.fsum(units) / len(units)
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    own_error = _standard_error(units)
    if method == "studentized" and len(units) < _FEW:
        low, high = value + own_error * stats.t.ppf(tails, len(units) - 1)
        return Interval(value=value, low=float(low), high=float(high), confidence=confidence, method="t")
    means, errors = _resampled(units, resamples, seed)
    if method == "studentized" and own_error > 0:
        # A resample that repeats a single unit has no spread.
        spread = errors > 1e-9 * own_error
        below, above = np.quantile((means[spread] - value) / errors[spread], tails) * own_error
        low, high = value - float(above), value - float(below)
        return Interval(value=value, low=low, high=high, confidence=confidence, method=method)
    if method == "bca" and np.ptp(units) > 0:
        tails = _bca_tails(units, means, value, tails)
    low, high = (float(bound) for bound in np.quantile(means, tails))
    return Interval(value=value, low=low, high=high, confidence=confidence, method=method)


def sign_flip_test(units: NDArray[np.float64], *, resamples: int, seed: int) -> float:
    """Test whether the mean is zero by flipping the sign of each unit at random.

    All flips are enumerated if their number does not exceed `resamples`. Otherwise flips are drawn at random, and the
    observed one is counted among them, so that the p-value is never 0.

    Args:
        units: one number per prompt.
        resamples: maximum number of flips.
        seed: seed of the flips.

    Returns:
        The two-sided p-value.
    """
    count = len(units)
    observed = abs(float(units.sum()))
    # The tolerance makes sums equal that differ only by the order of additions.
    bar = observed * (1 - 1e-12)
    if 2**count <= resamples:
        codes = np.arange(2**count)[:, None] >> np.arange(count)
        return float(np.mean(np.abs((1 - 2 * (codes & 1)) @ units) >= bar))
    generator = np.random.default_rng([seed, 1])
    hits = 0
    for size in _chunks(resamples, count):
        signs = 1 - 2 * generator.integers(0, 2, size=(size, count))
        hits += int((np.abs(signs @ units) >= bar).sum())
    return (hits + 1) / (resamples + 1)


def _resampled(
    units: NDArray[np.float64], resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the means of the resamples and their standard errors."""
    generator = np.random.default_rng([seed, 0])
    means, errors = [], []
    for size in _chunks(resamples, len(units)):
        drawn = units[generator.integers(0, len(units), size=(size, len(units)))]
        means.append(drawn.mean(1))
        errors.append(_standard_error(drawn))
    return np.concatenate(means), np.concatenate(errors)


def _standard_error(units: NDArray[np.float64]) -> Any:
    """Return the standard error of the mean along the last axis."""
    return units.std(axis=-1, ddof=1) / units.shape[-1] ** 0.5


def _bca_tails(
    units: NDArray[np.float64], means: NDArray[np.float64], value: float, tails: NDArray[np.float64]
) -> NDArray[np.float64]:
    below = (np.mean(means < value) + np.mean(means <= value)) / 2
    bias = stats.norm.ppf(np.clip(below, 1 / len(means), 1 - 1 / len(means)))
    # Removing one unit changes the mean by (mean - unit) / (n - 1); the constant cancels in the ratio.
    influence = units - units.mean()
    acceleration = float((influence**3).sum() / (6 * (influence**2).sum() ** 1.5))
    shifted = bias + stats.norm.ppf(tails)
    return stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))


def _wilson(rate: float, count: int, confidence: float) -> Interval:
    """Compute Wilson's interval with the prompts as trials; it has width even at a win rate of 1.

    Disagreement between samples of a prompt only narrows the true interval, so this one is conservative.
    """
    z = float(stats.norm.ppf((1 + confidence) / 2))
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return Interval(
        value=rate, low=max(0.0, centre - half), high=min(1.0, centre + half), confidence=confidence, method="wilson"
    )


def _chunks(total: int, width: int) -> list[int]:
    size = max(1, min(total, _CHUNK // width))
    return [size] * (total // size) + ([total % size] if total % size else [])
