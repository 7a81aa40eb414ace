"""What a report shows of one run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acpo_dist.analysis.report.drift_map import DriftMap
from acpo_dist.analysis.report.gallery import Gallery
from acpo_dist.analysis.report.metrics import RunMetrics
from acpo_dist.analysis.report.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class RunView:
    """Everything that the page shows of one run."""

    label: str
    record: RunRecord
    metrics: RunMetrics
    gallery: Gallery | None = None
    drift: DriftMap | None = None
    trajectories: Sequence[tuple[str, Mapping[str, Any]]] = ()
    """(name, VRG artefact), oldest first."""
    notes: Sequence[str] = ()
    """What is missing, and why."""
