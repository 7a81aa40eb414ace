"""Compare several runs: parameters that differ, means over seeds, and the Pareto front."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from acpo_dist.analysis.report.metrics import RunMetrics
from acpo_dist.analysis.report.record import RunRecord

COSMETIC = ("run.dir", "run.name", "run.seed", "tracking.", "checkpoint.", "cluster.")
"""Parameters that do not distinguish experiments: name, seed and path."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and standard deviation over runs."""

    mean: float
    std: float | None
    """None for a single run."""


@dataclass(frozen=True, kw_only=True)
class SeedGroup:
    """Runs that differ only in their seed."""

    label: str
    members: tuple[int, ...]
    """Positions in the list of runs."""
    counted: tuple[int, ...]
    """Members included in the means: finished runs, and the newest run of each seed."""
    seeds: tuple[int, ...]
    """Seeds of the counted runs."""
    left_out: str
    """Number of excluded members and the reasons; empty if there are none."""
    gains: Mapping[str, Spread]
    quality: Spread | None
    drift: Spread | None
    seconds: Spread | None

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


def labels_of(records: Sequence[RunRecord]) -> list[str]:
    """Return a short unique label per run: its name, plus seed, folder or MLflow run id if names are not unique."""
    labels = [record.name for record in records]
    seeds = [f"seed {record.seed}" for record in records]
    folders = [f"({record.root.name if record.root else str(record.mlflow_run_id)[:8]})" for record in records]
    whole = [f"({record.root or record.mlflow_run_id})" for record in records]
    for more in (seeds, folders, whole):
        same = {label: {m for other, m in zip(labels, more, strict=True) if other == label} for label in labels}
        labels = [f"{label} {m}" if len(same[label]) > 1 else label for label, m in zip(labels, more, strict=True)]
    return labels


def differences(records: Sequence[RunRecord]) -> dict[str, list[str | None]]:
    """Return the parameters that differ, with the value of each run; None if a run does not have the parameter."""
    keys = sorted({key for record in records for key in record.params})
    columns = {
        key: [record.params.get(key) for record in records] for key in keys if key not in ("run.dir", "run.name")
    }
    return {key: values for key, values in columns.items() if len(set(values)) > 1}


def seed_groups(records: Sequence[RunRecord], metrics: Sequence[RunMetrics], labels: Sequence[str]) -> list[SeedGroup]:
    """Group runs with equal parameters, except `COSMETIC` ones, in the order of first appearance.

    Means cover finished runs only, because metrics of an unfinished run belong to another iteration.
    """
    members: dict[frozenset[tuple[str, str]], list[int]] = {}
    for index, record in enumerate(records):
        key = frozenset((name, value) for name, value in record.params.items() if not name.startswith(COSMETIC))
        members.setdefault(key, []).append(index)
    groups = []
    for indices in members.values():
        counted, left_out = _counted(indices, records, metrics)
        chosen = [metrics[index] for index in counted]
        names = [name for each in chosen[:1] for name in each.gains if all(name in other.gains for other in chosen)]
        groups.append(
            SeedGroup(
                label=records[indices[0]].name if len(indices) > 1 else labels[indices[0]],
                members=tuple(indices), counted=tuple(counted), seeds=tuple(each.seed for each in chosen),
                left_out=left_out,
                gains={name: _spread([each.gains[name] for each in chosen]) for name in names},
                quality=_maybe([each.quality for each in chosen]), drift=_maybe([each.drift for each in chosen]),
                seconds=_maybe([each.seconds for each in chosen]),
            )
        )  # fmt: skip
    return groups


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the positions of the (drift, quality) points that no other point dominates in both values."""
    return [
        index
        for index, (drift, quality) in enumerate(points)
        if not any(
            other_drift <= drift and other_quality >= quality and (other_drift, other_quality) != (drift, quality)
            for other_drift, other_quality in points
        )
    ]


def _counted(
    indices: Sequence[int], records: Sequence[RunRecord], metrics: Sequence[RunMetrics]
) -> tuple[list[int], str]:
    final = [index for index in indices if metrics[index].final]
    by_seed: dict[int, int] = {}
    # The last run of each seed is used; dictionaries keep the position of the first.
    for index in sorted(final, key=lambda index: records[index].last_write or 0.0):
        by_seed[metrics[index].seed] = index
    counted = sorted(by_seed.values())
    reasons = {"not finished": len(indices) - len(final), "with a duplicate seed": len(final) - len(counted)}
    return counted, ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)


def _maybe(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return _spread(known) if known and len(known) == len(values) else None


def _spread(values: Sequence[float]) -> Spread:
    return Spread(mean=fmean(values), std=stdev(values) if len(values) > 1 else None)
