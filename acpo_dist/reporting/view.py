"""What a report shows of one run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acpo_dist.reporting.drift_map import DriftMap
from acpo_dist.reporting.figures import RunFigures
from acpo_dist.reporting.gallery import Gallery
from acpo_dist.reporting.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class RunView:
    """Everything that the page shows of one run."""

    label: str
    record: RunRecord
    figures: RunFigures
    gallery: Gallery | None = None
    drift: DriftMap | None = None
    trajectories: Sequence[tuple[str, Mapping[str, Any]]] = ()
    """(name, VRG artefact), oldest first."""
    notes: Sequence[str] = ()
    """What is missing, and why."""
