"""Train the runs of a sweep, skip those that are finished, and compare the combinations."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from acpo_dist.analysis.report.compare import SeedGroup, labels_of, pareto_front, seed_groups
from acpo_dist.analysis.report.metrics import RunMetrics, metrics_of
from acpo_dist.analysis.report.page import RunView, write_page
from acpo_dist.analysis.report.record import RunRecord, read_run
from acpo_dist.analysis.report.tables import SEED_COLUMNS, Table, seed_cells
from acpo_dist.config.schema import Config
from acpo_dist.core.errors import AcpoError
from acpo_dist.core.files import replace_file
from acpo_dist.tracking.panel import SIGMA
from acpo_dist.training.run_folder import RESOLVED, require_same

COLUMNS = ("front", *SEED_COLUMNS)
CHART, PAGE = "front.png", "sweep.html"

Train = Callable[[Config], object]
"""Executes one run, or continues it from its newest checkpoint."""


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Runs and combinations of a sweep."""

    metrics: Sequence[RunMetrics]
    """One per run that has metrics."""
    groups: Sequence[SeedGroup]
    """One per combination."""
    front: Sequence[int]
    """Positions of the groups that no other group dominates in mean drift and mean quality."""
    failed: dict[str, str]
    """Run folder -> message of the error that ended the run."""
    chart: Path | None
    """The chart; None without a finished run."""
    page: Path | None
    """HTML page that compares all runs."""

    @property
    def table(self) -> Table:
        """One row per combination."""
        rows = [["*" if at in self.front else "", *seed_cells(group)] for at, group in enumerate(self.groups)]
        return COLUMNS, rows

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return {
            "runs": [each.to_mapping() for each in self.metrics],
            "combinations": [
                {**asdict(group), "on_front": at in self.front} for at, group in enumerate(self.groups)
            ],
            "front": [self.groups[at].label for at in self.front],
            "failed": self.failed,
            "chart": str(self.chart) if self.chart else None,
            "page": str(self.page) if self.page else None,
        }  # fmt: skip


def run_sweep(configs: Sequence[Config], root: Path, train: Train, tell: Callable[[str], None]) -> SweepResult:
    """Execute every run that is not finished, one after another, then compare all.

    A run that fails does not stop the others.

    Args:
        configs: one per run, see `configurations`.
        root: folder of the sweep; chart and page are written there.
        train: executes a run.
        tell: receives one line per run.

    Raises:
        ResumeError: a run folder holds a run with another configuration.
    """
    for config in configs:
        if (config.run_dir / RESOLVED).exists():
            require_same(config, config.run_dir)
    failed: dict[str, str] = {}
    for number, config in enumerate(configs, 1):
        label = f"run {number} of {len(configs)}: {config.run.name}, seed {config.run.seed}"
        if _finished(config):
            tell(f"{label}: finished before")
            continue
        tell(label)
        try:
            train(config)
        except AcpoError as error:
            failed[str(config.run_dir)] = f"{type(error).__name__}: {error}"
            tell(f"{label} failed: {failed[str(config.run_dir)]}")
    return compare_runs([config.run_dir for config in configs], root, failed)


def compare_runs(folders: Sequence[Path], root: Path, failed: dict[str, str]) -> SweepResult:
    """Compare the runs in the folders, and write chart and page; folders without metrics are left out."""
    found = [read_run(folder) for folder in folders if (folder / RESOLVED).exists()]
    records = [record for record in found if record.rows]
    metrics, labels = [metrics_of(record) for record in records], labels_of(records)
    groups = seed_groups(records, metrics, labels)
    known = [at for at, group in enumerate(groups) if group.drift is not None and group.quality is not None]
    front = [known[place] for place in pareto_front([_point(groups[at]) for at in known])]
    chart, page = (root / CHART, root / PAGE) if known else (None, None)
    if chart is not None and page is not None:
        _draw(chart, [groups[at] for at in known], {known.index(at) for at in front})
        write_page(page, _views(labels, records, metrics), panels=False)
    return SweepResult(metrics=metrics, groups=groups, front=front, failed=failed, chart=chart, page=page)


def _finished(config: Config) -> bool:
    if not (config.run_dir / RESOLVED).exists():
        return False
    record = read_run(config.run_dir)
    ended = record.state == "finished" and record.done >= config.run.iterations
    return ended or record.guard_end is not None


def _point(group: SeedGroup) -> tuple[float, float]:
    assert group.drift is not None and group.quality is not None
    return group.drift.mean, group.quality.mean


def _views(labels: Sequence[str], records: Sequence[RunRecord], metrics: Sequence[RunMetrics]) -> list[RunView]:
    rows = zip(labels, records, metrics, strict=True)
    return [RunView(label=label, record=record, metrics=each) for label, record, each in rows]


def _draw(path: Path, groups: Sequence[SeedGroup], front: set[int]) -> None:
    """Draw mean and standard deviation of quality against drift, and the front as a line."""
    # Imported here: matplotlib takes a second to load. pyplot is avoided: its figures and backend are process-wide.
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for at, group in enumerate(groups):
        drift, quality = _point(group)
        axis.errorbar(
            drift, quality, xerr=group.drift and group.drift.std, yerr=group.quality and group.quality.std,
            fmt="o" if at in front else "x", capsize=3, label=group.label,
        )  # fmt: skip
    line = sorted(_point(groups[at]) for at in front)
    axis.plot(*zip(*line, strict=True), "--", color="grey", linewidth=1, label="front", zorder=0)
    axis.set_xlabel("RMS drift from the base model")
    axis.set_ylabel(f"gain of the judges, base {SIGMA}")
    axis.legend(fontsize=7)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())
