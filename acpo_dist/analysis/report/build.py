"""Build a report from run folders."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from acpo_dist.analysis.report.compare import labels_of
from acpo_dist.analysis.report.drift_map import from_checkpoints, from_rows
from acpo_dist.analysis.report.gallery import make_gallery
from acpo_dist.analysis.report.metrics import RunMetrics, metrics_of, verdict
from acpo_dist.analysis.report.page import RunView, write_page
from acpo_dist.analysis.report.record import RunRecord, read_run, require_rows
from acpo_dist.analysis.report.sample_renderer import REPORT, SampleRenderer, chosen_iteration
from acpo_dist.config.schema import TrackingConfig
from acpo_dist.core.errors import AcpoError, VrgError
from acpo_dist.core.files import replace_file
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.mlflow_query import attach
from acpo_dist.tracking.mlflow_tracker import default_uri
from acpo_dist.training.trajectory.artefact import read_artefact

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GalleryOptions:
    """Images of a report: how many, and of which checkpoint."""

    prompts: int
    per_prompt: int
    at: str
    """`export`, `last`, `best` or an iteration; see `chosen_iteration`."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a report."""

    path: Path
    views: Sequence[RunView]
    tracked: Mapping[str, bool]
    """Label -> whether the page was added to the run in MLflow; runs without MLflow are omitted."""


def build_report(
    roots: Sequence[Path], out: Path | None, gallery_options: GalleryOptions | None, *, track: bool, console: Console
) -> Report:
    """Read runs, render missing images, write one page, and add it to the runs in MLflow.

    Args:
        roots: run folders.
        out: path of the page; None writes `report.html` in the run, or beside the first of several.
        gallery_options: None loads no model: no images, and drift by timestep only if the run recorded it.
        track: add the page to the runs in MLflow.
        console: shows progress.

    Returns:
        Path of the page, and where it was added.

    Raises:
        UsageError: a folder is no run, or a run has no metrics; nothing is written then.
    """
    records = [require_rows(read_run(root)) for root in roots]
    views = [
        _view(record, label, gallery_options, console)
        for record, label in zip(records, labels_of(records), strict=True)
    ]
    path = out or (roots[0] if len(roots) == 1 else roots[0].parent) / "report.html"
    write_page(path, views)
    tracked = {}
    for view in views if track else ():
        uri = _tracking_uri(view.record)
        if uri is not None:
            tracked[view.label] = _track(view, path, uri, console)
    return Report(path=path, views=views, tracked=tracked)


def _view(record: RunRecord, label: str, gallery_options: GalleryOptions | None, console: Console) -> RunView:
    notes = []
    if record.broken_lines:
        notes.append(f"{record.broken_lines} unreadable line(s) of metrics.jsonl were omitted.")
    skipped = sum(row.get("learner/skipped_steps") or 0 for row in record.rows)
    if skipped:
        notes.append(
            f"{skipped:.0f} optimiser step(s) were skipped because they were not finite (skipped_steps.jsonl)."
        )
    if not record.normalisers and not any(key.endswith("/gain") for key in record.rows[0]):
        notes.append("Gains by iteration are unknown: no checkpoint holds the normalisers of the base model's scores.")
    gallery, drift = None, from_rows(record)
    if gallery_options is None:
        notes.append("Images were omitted (--no-samples).")
    elif not record.checkpoints:
        notes.append("No complete checkpoint: images, and drift by timestep, need one (checkpoint.every).")
    else:
        iteration = chosen_iteration(record, gallery_options.at)
        assert iteration is not None and record.root is not None
        console.message(f"{label}: images of iteration {iteration} and of the base model")
        renderer = SampleRenderer(
            record, prompts=gallery_options.prompts, per_prompt=gallery_options.per_prompt, console=console
        )
        gallery = make_gallery(record, renderer, iteration)
        drift = drift or from_checkpoints(record, renderer, console)
        renderer.close()
        extra = {"judged_gain_of_images": sum(pair.gain for pair in gallery.pairs) / len(gallery.pairs)}
        if gallery.diversity is not None:
            extra["diversity"] = gallery.diversity
        replace_file(record.root / REPORT / "summary.json", json.dumps(extra).encode())
        record = replace(record, extra=extra)
    trajectories, problems = _trajectories(record)
    return RunView(
        label=label,
        record=record,
        metrics=metrics_of(record),
        gallery=gallery,
        drift=drift,
        trajectories=trajectories,
        notes=[*notes, *problems],
    )


def _trajectories(record: RunRecord) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    found, problems = [], []
    for path in sorted(((record.root or Path()) / "vrg").glob("*.json")) if record.root else []:
        try:
            found.append((f"iteration {int(path.stem)}" if path.stem.isdigit() else path.stem, read_artefact(path)))
        except VrgError as error:
            problems.append(str(error))
    return found, problems


def _tracking_uri(record: RunRecord) -> str | None:
    """Return the tracking URI of the run; None if it was not tracked."""
    tracking = record.config.get("tracking") or {}
    if record.mlflow_run_id is None or record.root is None or not tracking.get("mlflow", TrackingConfig().mlflow):
        return None
    return tracking.get("mlflow_uri") or default_uri(record.root)


def _track(view: RunView, path: Path, uri: str, console: Console) -> bool:
    assert view.record.mlflow_run_id is not None
    try:
        attach(
            uri,
            view.record.mlflow_run_id,
            path,
            folder="report",
            metrics=_tracked_metrics(view.metrics),
            step=view.metrics.iterations,
            tags={"verdict": verdict(view.metrics)[1], "report": f"report/{path.name}"},
        )
    except AcpoError as error:
        # The page is written, so an unreachable server is not a failure.
        console.message(f"not added to MLflow: {error}")
        return False
    return True


def _tracked_metrics(metrics: RunMetrics) -> dict[str, float]:
    values = {"report/quality": metrics.quality, "report/drift": metrics.drift, "report/diversity": metrics.diversity}
    return {name: value for name, value in values.items() if value is not None}
