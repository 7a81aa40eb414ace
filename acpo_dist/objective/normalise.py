"""Score normalisation with statistics of base-model samples, which stay fixed during a run."""

import math
import statistics
from collections.abc import Sequence

from acpo_dist.core.errors import RewardError
from acpo_dist.core.types import Normaliser

_ROUNDING = 1e-6
"""Relative spread of equal scores that is due to float32 rounding."""


def fit_normaliser(
    name: str, scores: Sequence[float], *, higher_is_better: bool, target_quantile: float | None
) -> Normaliser:
    """Fit the mean and standard deviation of a metric on base samples, and the hinge target as a quantile.

    Args:
        name: metric name, for the error message.
        scores: raw scores of base samples.
        higher_is_better: direction of the metric.
        target_quantile: quantile of the normalised base scores that is the hinge target; None leaves it unset.

    Raises:
        RewardError: there are fewer than two scores, a score is not finite, or the scores are equal up to rounding.
    """
    if len(scores) < 2 or not all(math.isfinite(score) for score in scores):
        raise RewardError(f"metric `{name}`: calibration needs at least two finite scores, found {len(scores)}")
    mean, std = statistics.fmean(scores), statistics.pstdev(scores)
    # Scores are float32 numbers; differences in the last digits are rounding errors.
    if std <= _ROUNDING * max(abs(score) for score in scores):
        raise RewardError(
            f"metric `{name}` gives {mean:g} for all {len(scores)} base samples: it does not distinguish them, so "
            "there is nothing to learn from it. Check that it fits the image size and kind, or remove it."
        )
    sign = 1 if higher_is_better else -1
    target = None
    if target_quantile is not None:
        ordered = sorted(sign * (score - mean) / std for score in scores)
        target = ordered[min(len(ordered) - 1, int(target_quantile * len(ordered)))]
    return Normaliser(mean=mean, std=std, sign=sign, target=target)
