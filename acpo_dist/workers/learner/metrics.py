"""Sums and counts of per-sample metrics, which merge exactly over micro-batches and ranks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from acpo_dist.core.types import SkippedStep, TrainReport


@dataclass
class MetricSums:
    """Running sums by name."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add per-sample values."""
        for name, values in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.detach().double().sum())
            self.counts[name] = self.counts.get(name, 0) + values.numel()

    def means(self) -> dict[str, float]:
        """Return the mean of every metric."""
        return {name: self.sums[name] / self.counts[name] for name in sorted(self.sums) if self.counts[name]}

    @staticmethod
    def merge(parts: Iterable["MetricSums"]) -> "MetricSums":
        """Join the sums of several ranks."""
        whole = MetricSums()
        for part in parts:
            for name, value in part.sums.items():
                whole.sums[name] = whole.sums.get(name, 0.0) + value
                whole.counts[name] = whole.counts.get(name, 0) + part.counts[name]
        return whole


def merged_lists(ranks: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Join per-sample values of all ranks by name, in the order of the ranks."""
    whole: dict[str, list[float]] = {}
    for part in ranks:
        for name, values in part.items():
            whole.setdefault(name, []).extend(values)
    return whole


def merged_drift(ranks: Iterable[MetricSums]) -> dict[int, float]:
    """Join the drift by timestep of all ranks."""
    return {int(timestep): value for timestep, value in MetricSums.merge(ranks).means().items()}


def merged_report(ranks: Sequence[tuple[MetricSums, int, list[SkippedStep], bool]]) -> TrainReport:
    """Join the results of all ranks: metrics, steps taken, skipped steps, and whether too many were skipped."""
    # All ranks skip the same steps, and each reports its own samples.
    skipped = zip(*(steps for _, _, steps, _ in ranks), strict=True)
    return TrainReport(
        metrics=MetricSums.merge(metrics for metrics, *_ in ranks).means(),
        optim_steps=ranks[0][1],
        skipped=tuple(
            replace(one[0], sample_ids=tuple(name for rank in one for name in rank.sample_ids)) for one in skipped
        ),
        too_many=ranks[0][3],
    )
