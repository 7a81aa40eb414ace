"""Sums and counts of per-sample metrics, which merge exactly over micro-batches and ranks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


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
