"""Find runs in folders and in an MLflow experiment."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from acpo_dist.analysis.report.record import RunRecord, read_run, split_rows
from acpo_dist.core.errors import UsageError
from acpo_dist.tracking.mlflow_query import TrackedRun, find_tracked_runs
from acpo_dist.tracking.mlflow_tracker import default_uri
from acpo_dist.training.run_folder import RESOLVED

_NO_RUNS = ("mlartifacts", "mlruns")
"""Folders of MLflow, which hold copies of `resolved.yaml`."""
MAX_DEPTH = 4
"""Search depth below the given folder."""
_HISTORIES = ("reward/", "judge/", "gain/", "drift/", "guard/", "time/iteration")


def runs_below(folder: Path) -> tuple[list[RunRecord], list[str]]:
    """Return all runs in a folder, including itself, sorted by path, and a message for each unreadable run.

    Raises:
        UsageError: the folder does not exist or contains no run.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}. `acpo train` writes runs to `runs/` by default.")
    found, problems = [], []
    for root in sorted(_roots(folder, MAX_DEPTH)):
        try:
            found.append(read_run(root))
        except UsageError as error:
            problems.append(str(error))
    if not found and not problems:
        raise UsageError(
            f"no run in {folder}: expected folders with {RESOLVED}, at most {MAX_DEPTH} levels below it. Give "
            "another folder, or --experiment for runs in MLflow."
        )
    return found, problems


def runs_of_experiment(experiment: str, uri: str | None) -> list[RunRecord]:
    """Return the runs of an MLflow experiment; a run whose folder is on this machine is read from the folder.

    Args:
        experiment: name of the experiment.
        uri: None uses MLFLOW_TRACKING_URI, or `runs/mlflow.db`.

    Raises:
        UsageError: MLflow cannot be used, or the experiment does not exist or has no run.
    """
    where = tracking_uri(uri)
    tracked = find_tracked_runs(where, experiment, _HISTORIES)
    if not tracked:
        raise UsageError(f"the experiment `{experiment}` at {where} has no run yet")
    return [_record(run) for run in tracked]


def tracking_uri(uri: str | None) -> str:
    """Return the given URI, else MLFLOW_TRACKING_URI, else the database beside the default run folders."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(Path("runs") / "any")


def gather(paths: Sequence[Path], experiment: str | None, uri: str | None) -> list[RunRecord]:
    """Return the runs in folders and in an experiment.

    Raises:
        UsageError: no folder and no experiment was given, or one of them contains no run.
    """
    if not paths and experiment is None:
        raise UsageError("give run folders, or --experiment for runs in MLflow")
    found: list[RunRecord] = []
    for path in paths:
        # A folder of runs selects all of them; any other path must be a run, or reading it fails.
        inside = sorted(_roots(path, MAX_DEPTH)) if path.is_dir() else []
        found.extend(read_run(root) for root in inside or [path])
    if experiment is not None:
        found.extend(runs_of_experiment(experiment, uri))
    unique = {
        str(record.root.resolve()) if record.root else f"mlflow:{record.mlflow_run_id}": record for record in found
    }
    return list(unique.values())


def _roots(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / RESOLVED).is_file():
        yield folder
    elif depth > 0:
        for child in folder.iterdir():
            if child.is_dir() and not child.is_symlink() and not child.name.startswith((".", *_NO_RUNS)):
                yield from _roots(child, depth - 1)


def _record(run: TrackedRun) -> RunRecord:
    root = Path(run.tags.get("run_dir", ""))
    own = root / "mlflow" / "run_id"
    # The folder at this path may hold another run by now, so the run ids are compared.
    if run.tags.get("run_dir") and own.is_file() and own.read_text().strip() == run.run_id:
        return read_run(root, status=run.status)
    rows, gains = split_rows([_finite(row) for row in run.rows])
    return RunRecord(
        name=run.params.get("run.name", run.name), seed=int(run.params.get("run.seed", 0)), root=None,
        config=_nested(run.params), params=run.params, rows=rows, gains=gains, normalisers={}, status=run.status,
        mlflow_run_id=run.run_id, seconds=run.seconds, guard_events=_guard(run),
        extra={"diversity": run.metrics["report/diversity"]} if "report/diversity" in run.metrics else {},
    )  # fmt: skip


def _finite(row: Any) -> dict[str, Any]:
    return {key: value if isinstance(value, int) or math.isfinite(value) else None for key, value in row.items()}


def _guard(run: TrackedRun) -> list[dict[str, Any]]:
    action = run.tags.get("guard")
    if action not in ("stop", "roll_back"):
        return []
    return [{"action": action, "text": " ".join(run.tags.get("guard_reason", "no reason recorded").splitlines())}]


def _nested(params: Any) -> dict[str, Any]:
    """Return the configuration values that metrics need, from the flat texts in MLflow."""
    limits: dict[str, Any] = {}
    for key, text in params.items():
        section, _, rest = key.partition(".")
        rule, _, bound = rest.partition(".")
        if section == "guard" and bound in ("warn", "stop"):
            limits.setdefault(rule, {})[bound] = _number(text)
    budget = _number(params.get("guard.drift_budget", ""))
    return {
        "run": {"name": params.get("run.name", ""), "iterations": _number(params.get("run.iterations", ""))},
        "guard": {**limits, "drift_budget": budget},
    }


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
