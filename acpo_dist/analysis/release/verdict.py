"""Decide whether a run may be promoted, from the guard's decisions and the state of its rules at the end."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import UsageError
from acpo_dist.tracking.jsonl import read_metrics
from acpo_dist.training.export import read_export_facts
from acpo_dist.training.guard.decision import Reason
from acpo_dist.workers.learner.checkpoint import Checkpoint, CheckpointStore

_ENDING = ("stop", "roll_back")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Objections to promoting a run."""

    objections: tuple[str, ...]
    """Empty if the guard is clean."""
    remarks: tuple[str, ...]
    """Guard decisions during the run, including those that did not end it."""
    exported: str | None
    """SHA-256 of the weights that the run's export holds."""
    best: int
    """Iteration of the checkpoint with the best judge scores; 0 is the base model."""

    @property
    def clean(self) -> bool:
        """Whether there is no objection."""
        return not self.objections


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the guard ended a run."""

    action: str
    """`stop` or `roll_back`."""
    best: int
    """Iteration of the checkpoint with the best judge scores at that time; 0 is the base model."""
    text: str
    """Message for the user."""


def guard_ending(run: Path, iterations: int) -> Ending | None:
    """Return how the guard ended a run after `iterations` iterations; None if it did not, or the run was resumed."""
    records = guard_records(run)
    if not records or records[-1]["action"] not in _ENDING or records[-1]["iteration"] + 1 < iterations:
        return None
    record = records[-1]
    return Ending(action=record["action"], best=int(record["best_iteration"]), text=_ended(record))


def guard_records(run: Path) -> list[dict[str, Any]]:
    """Return the guard's records of a run, oldest first."""
    path = run / "guard.jsonl"
    return read_metrics(path) if path.is_file() else []


def judge_run(run: Path, config: Config) -> tuple[Verdict, Checkpoint]:
    """Return the verdict on a finished run and its newest checkpoint.

    Raises:
        UsageError: the run has not ended, or has no checkpoint.
    """
    newest = CheckpointStore(run / "checkpoints", keep=config.checkpoint.keep).newest()
    facts = read_export_facts(run / "export")
    if newest is None or facts is None:
        raise UsageError(f"{run} has no export, so there is nothing to promote: a run exports its model when it ends.")
    records = guard_records(run)
    state = newest.state["guard"]["state"]
    objections = [_ended(record) for record in records if record["action"] in _ENDING]
    # A decision that ended the run covers the rules.
    if not objections:
        objections += [
            f"the guard's rule `{name}` was at level `{rule['level']}` when the run ended"
            for name, rule in sorted(state["rules"].items())
            if rule["level"] != "ok"
        ]
    if not config.rewards.judges:
        objections.append("the run had no held-out judge (rewards.judges is empty)")
    return Verdict(
        objections=tuple(objections), remarks=tuple(_remark(record) for record in records),
        exported=facts.get("policy_sha256"), best=newest.best_iteration,
    ), newest  # fmt: skip


def metrics_at(run: Path, iteration: int) -> dict[str, float]:
    """Return the metrics of the last iteration before a checkpoint, by name."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["iteration"] < iteration]
    found = rows[-1] if rows else {}
    return {name: float(value) for name, value in found.items() if name != "iteration" and value is not None}


def gains_of(run: Path) -> dict[str, float]:
    """Return gains of the last weights on the calibration prompts and seeds, in base standard deviations."""
    found: dict[str, float] = {}
    for row in read_metrics(run / "metrics.jsonl"):
        found |= {
            name[5:]: float(value) for name, value in row.items() if name.startswith("gain/") and value is not None
        }
    return found


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read the result of `acpo eval`.

    Raises:
        UsageError: the folder holds no finished evaluation.
    """
    path = folder / "evaluation.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no finished evaluation: {path.name} cannot be read ({error})") from error


def _ended(record: Mapping[str, Any]) -> str:
    return f"the guard ended the run after iteration {record['iteration'] + 1} ({record['action']}): {_why(record)}"


def _why(record: Mapping[str, Any]) -> str:
    return "; ".join(Reason(**reason).text for reason in record["reasons"]) or "no reason recorded"


def _remark(record: Mapping[str, Any]) -> str:
    return f"iteration {record['iteration'] + 1}, {record['action']}: {_why(record)}"
