"""Input of the guard for one iteration: values relative to the base model's calibration samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, pstdev
from typing import Any

from acpo_dist.core.types import Normaliser, ScoreTable


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of the calibration samples; frozen for the run and saved with the checkpoint."""

    content_mean: Mapping[str, float]
    content_std: Mapping[str, float]
    diversity: float | None = None
    """Computed with the same estimator, features and sample count as in the iterations."""

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data for `state.json`; `Reference(**mapping)` restores it exactly."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Signals of one iteration; a rule whose signal is missing is not checked."""

    reward_gains: Mapping[str, float] = field(default_factory=dict)
    """Mean normalised score of each training metric: 0 is the base model, 1 one standard deviation of its samples."""
    judge_gains: Mapping[str, float] = field(default_factory=dict)
    """The same of each judge."""
    content_shifts: Mapping[str, float] = field(default_factory=dict)
    """Shift of each statistic's mean, in base standard deviations."""
    diversity: float | None = None
    """As a ratio to the base model's."""
    drift: float | None = None
    """Rms drift as a multiple of its budget."""

    def flat(self) -> dict[str, float]:
        """Return all signals by name, as smoothed by the guard and recorded by tracking.

        Raises:
            ValueError: a signal is not finite.
        """
        metrics = {
            **{f"reward/{name}": value for name, value in self.reward_gains.items()},
            **{f"judge/{name}": value for name, value in self.judge_gains.items()},
            **{f"content/{name}": value for name, value in self.content_shifts.items()},
        }
        rest = (("diversity", self.diversity), ("drift", self.drift))
        metrics |= {name: value for name, value in rest if value is not None}
        broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if broken:
            raise ValueError(f"the guard needs finite signals, found {broken}")
        return metrics


def fit_reference(content: Mapping[str, Sequence[float]], *, diversity: float | None, min_std: float) -> Reference:
    """Compute the statistics of the calibration samples.

    Args:
        content: statistic -> one value per calibration sample, each in [0, 1].
        diversity: diversity of calibration samples, with the estimator and sample count of the iterations.
        min_std: smallest standard deviation, because base samples may be constant in a statistic.

    Raises:
        ValueError: no sample, or a diversity that is not positive, so that a ratio to it is not defined.
    """
    if diversity is not None and not diversity > 0:
        raise ValueError(f"the base model's diversity must be positive, found {diversity}: omit it")
    return Reference(
        content_mean={name: fmean(values) for name, values in content.items()},
        content_std={name: max(min_std, pstdev(values)) for name, values in content.items()},
        diversity=diversity,
    )  # fmt: skip


def measure_signals(
    *, train: Sequence[str], judges: Sequence[str], scores: ScoreTable, normalisers: Mapping[str, Normaliser],
    content: Mapping[str, Sequence[float]], reference: Reference, diversity: float | None = None,
    drift_rms: float | None = None, drift_budget: float | None = None,
) -> Signals:  # fmt: skip
    """Compute one iteration's signals from raw scores and statistics.

    Args:
        train: names of the metrics that drive the update.
        judges: names of the metrics that only measure.
        scores: raw scores of the iteration's samples.
        normalisers: of the calibration samples, by metric.
        content: statistic -> one value per sample of the iteration.
        diversity: raw, by the reference's estimator.
        drift_rms: rms drift of the iteration, in noise units.
        drift_budget: rms drift that the ratio is relative to; None leaves out the drift signal.
    """

    def gain(name: str) -> float:
        return fmean(normalisers[name].normalise(score) for score in scores[name].values())

    return Signals(
        reward_gains={name: gain(name) for name in train},
        judge_gains={name: gain(name) for name in judges},
        content_shifts={
            name: (fmean(values) - reference.content_mean[name]) / reference.content_std[name]
            for name, values in content.items()
        },
        diversity=_ratio(diversity, reference.diversity),
        drift=_ratio(drift_rms, drift_budget),
    )


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value / base
