"""Read a run folder: configuration, metrics by iteration, guard, checkpoints. No model is loaded."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from acpo_dist.core.errors import UsageError
from acpo_dist.core.types import Normaliser
from acpo_dist.tracking.jsonl import parse_object, read_metrics
from acpo_dist.tracking.mlflow_records import flatten
from acpo_dist.training.run_folder import METRICS, RESOLVED
from acpo_dist.training.run_lock import Sign, lock_holder, sign_of

logger = logging.getLogger(__name__)

ROLES = ("reward", "judge")
_RECENT_ITERATIONS = 5
"""Number of last iterations that are averaged for an unfinished run."""
_QUIET_S = 120.0
"""Seconds without a new row after which a run on another host no longer counts as running; at least five iterations."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as read by lists, comparisons and reports."""

    name: str
    seed: int
    root: Path | None
    """None for a run that only MLflow has."""
    config: Mapping[str, Any]
    """As in `resolved.yaml`; not validated, so that runs of other versions can still be read."""
    params: Mapping[str, str]
    """The configuration as a flat mapping, with the keys of overrides."""
    rows: Sequence[Mapping[str, Any]]
    """Training iterations in order; a metric that was not finite is None."""
    gains: Mapping[str, float]
    """Gain of the final weights in base standard deviations, by metric; empty until the run has ended."""
    normalisers: Mapping[str, Normaliser]
    """From the newest checkpoint; empty without one."""
    guard_events: Sequence[Mapping[str, Any]] = ()
    checkpoints: Sequence[int] = ()
    broken_lines: int = 0
    status: str | None = None
    """Status in MLflow; None if it was not read from MLflow."""
    mlflow_run_id: str | None = None
    holder_sign: Sign | None = None
    """Whether the process in the run lock is alive; None without a run lock."""
    last_write: float | None = None
    """Seconds since the epoch."""
    seconds: float | None = None
    """Wall time in seconds, if known from another source than the rows."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Metrics of an earlier report, such as `diversity`."""

    @cached_property
    def metrics_by_role(self) -> dict[str, list[str]]:
        """`reward` and `judge` -> metric names, in the order of the first row."""
        found: dict[str, list[str]] = {role: [] for role in ROLES}
        for key in dict.fromkeys(key for row in self.rows[:1] for key in row):
            role, _, rest = key.partition("/")
            if role in found and rest.endswith("/mean"):
                found[role].append(rest.removesuffix("/mean"))
        return found

    @property
    def done(self) -> int:
        """Number of completed iterations."""
        return int(self.rows[-1]["iteration"]) + 1 if self.rows else 0

    @property
    def total(self) -> int | None:
        """Number of iterations in the configuration."""
        value = self.config.get("run", {}).get("iterations")
        return int(value) if value is not None else None

    @property
    def guard_end(self) -> Mapping[str, Any] | None:
        """The guard decision that ended the run; None if it did not, or if the run was resumed since."""
        last = self.guard_events[-1] if self.guard_events else {}
        ended = last.get("action") in ("stop", "roll_back") and int(last.get("iteration", self.done)) + 1 >= self.done
        return last if ended else None

    @property
    def state(self) -> str:
        """`finished`, `stopped by guard`, `running`, `unfinished`, `no metrics`, `failed` or `killed`."""
        if self.guard_end is not None:
            return "stopped by guard"
        if self.status in ("FAILED", "KILLED"):
            return str(self.status).lower()
        if self.gains:
            return "finished"
        if self.holder_sign == "alive":
            return "running"
        if self.last_write is not None and self.rows and self.holder_sign == "unknown":
            each = fmean(row.get("time/iteration") or 0.0 for row in self.rows[-_RECENT_ITERATIONS:])
            # Either sign: the clock of this machine may have been set back, or differ from that of the storage.
            if abs(time.time() - self.last_write) < max(_QUIET_S, _RECENT_ITERATIONS * each):
                return "running"
        if not self.rows:
            return "no metrics"
        return "running" if self.status == "RUNNING" and self.root is None else "unfinished"

    def gain_of(self, role: str, name: str, row: Mapping[str, Any]) -> float | None:
        """Return a metric's mean in base standard deviations at one iteration; None if unknown."""
        if (told := row.get(f"{role}/{name}/gain")) is not None:
            return float(told)
        mean, normaliser = row.get(f"{role}/{name}/mean"), self.normalisers.get(name)
        return normaliser.normalise(float(mean)) if mean is not None and normaliser is not None else None

    def mean_gain(self, row: Mapping[str, Any], role: str) -> float | None:
        """Return the mean over the metrics of a role; None unless all of them are known."""
        values = [self.gain_of(role, name, row) for name in self.metrics_by_role[role]]
        known = [value for value in values if value is not None]
        return fmean(known) if known and len(known) == len(values) else None

    def recent(self, key: str) -> float | None:
        """Return the mean of a metric over the last iterations."""
        values = [row[key] for row in self.rows[-_RECENT_ITERATIONS:] if row.get(key) is not None]
        return fmean(values) if values else None

    def with_gains(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with `<role>/<name>/gain` added if it can be computed."""
        known = {
            f"{role}/{name}/gain": self.gain_of(role, name, row)
            for role, names in self.metrics_by_role.items()
            for name in names
        }
        return {**row, **{key: value for key, value in known.items() if value is not None}}


def read_run(root: Path, *, status: str | None = None) -> RunRecord:
    """Read a run folder; a run without metrics is accepted, broken lines are omitted and counted.

    Raises:
        UsageError: the folder is no run, or its configuration cannot be read.
    """
    config = _read_config(root)
    rows, gains, broken = _read_rows(root / METRICS)
    state = _newest_state(root / "checkpoints")
    run_id, holder = root / "mlflow" / "run_id", lock_holder(root)
    return RunRecord(
        name=str(config.get("run", {}).get("name", root.name)), seed=int(config.get("run", {}).get("seed", 0)),
        root=root, config=config, params=flatten(config), rows=rows, gains=gains,
        normalisers={name: Normaliser(**value) for name, value in state.get("normalisers", {}).items()},
        guard_events=_read_lines(root / "guard.jsonl"), checkpoints=checkpoint_iterations(root), broken_lines=broken,
        status=status, mlflow_run_id=run_id.read_text().strip() or None if run_id.is_file() else None,
        holder_sign=sign_of(holder) if holder is not None else None,
        last_write=(root / METRICS).stat().st_mtime if (root / METRICS).is_file() else None,
        extra=_read_extra(root / "report" / "summary.json"),
    )  # fmt: skip


def require_rows(record: RunRecord) -> RunRecord:
    """Return the record if it has metrics.

    Raises:
        UsageError: no iteration was recorded.
    """
    if not record.rows:
        raise UsageError(
            f"{record.root or record.name} has no metrics: expected one line per iteration in {METRICS}, found "
            f"{'only unreadable lines' if record.broken_lines else 'none'}. Wait for its first iteration, or give "
            "another run."
        )
    return record


def checkpoint_iterations(root: Path) -> list[int]:
    """Return the iterations of complete checkpoints, ascending."""
    folders = (root / "checkpoints").glob("[0-9]*/manifest.json")
    return sorted(int(path.parent.name) for path in folders if path.parent.name.isdigit())


def split_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return training iterations and final gains; lines of one iteration are merged, evaluation-only lines omitted."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        if isinstance(row.get("iteration"), int):
            merged.setdefault(row["iteration"], {}).update(row)
    gains = {
        key.removeprefix("gain/"): float(value)
        for _, row in sorted(merged.items())
        for key, value in row.items()
        if key.startswith("gain/") and value is not None
    }
    trained = [row for _, row in sorted(merged.items()) if any(key.startswith("reward/") for key in row)]
    return trained, gains


def _read_config(root: Path) -> dict[str, Any]:
    path = root / RESOLVED
    if not path.is_file():
        found = "a folder without it" if root.is_dir() else "no such folder"
        raise UsageError(
            f"{root} is not a run: expected a folder with {RESOLVED}, found {found}. Give a folder written by `acpo "
            "train`; `acpo runs FOLDER` lists the runs below a folder."
        )
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path} cannot be read as YAML: {error}. `acpo train` wrote this file; restore it."
        ) from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: expected sections, found {type(config).__name__}")
    return config


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, float], int]:
    if not path.is_file():
        return [], {}, 0
    rows = read_metrics(path)
    lines = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    return *split_rows(rows), lines - len(rows)


def _newest_state(folder: Path) -> dict[str, Any]:
    """Return the state of the newest checkpoint from its JSON file; checksums are verified where weights are loaded."""
    for path in sorted(folder.glob("[0-9]*/state.json"), reverse=True):
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s); trying the previous checkpoint", path, error)
    return {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    parsed = [parse_object(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    return [row for row in parsed if row is not None]


def _read_extra(path: Path) -> dict[str, float]:
    value = parse_object(path.read_bytes()) if path.is_file() else None
    return {key: float(number) for key, number in (value or {}).items() if isinstance(number, int | float)}
