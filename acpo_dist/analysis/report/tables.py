"""Tables of `acpo runs`, `acpo compare` and the report: metrics as text, the same on a terminal and in HTML."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from acpo_dist.analysis.report.compare import SeedGroup, Spread
from acpo_dist.analysis.report.metrics import PHASES, RunMetrics
from acpo_dist.analysis.report.record import ROLES, RunRecord

COLUMNS = ("run", "seed", "state", "iterations", "quality", "rewards", "judges", "drift", "diversity", "guard", "time")
LIST_COLUMNS = ("run", "seed", "state", "done", "reward", "judge", "drift", "guard", "time", "path")
SEED_COLUMNS = ("runs", "seeds", "left out", "quality", "drift", "gains", "time")
PHASE_COLUMNS = ("phase", "in all", "share", "per iteration", "idle", "reserves")
_ROLE_OF = {"rollout": "rollout", "reward": "reward", "learn": "learner"}
"""Role that works in a phase."""
TRAJECTORY_COLUMNS = ("measured at", "error before", "error after", "validation ratio", "outcome")
_MOST_ROWS = 500

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""(columns, rows)."""


def signed(value: float | None, digits: int = 2) -> str:
    """Format a gain with its sign."""
    return "-" if value is None else f"{value:+.{digits}f}"


def short(value: float | None) -> str:
    """Format a value with three significant digits."""
    return "-" if value is None else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Format seconds in the largest fitting unit."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def run_cells(metrics: RunMetrics) -> list[str]:
    """Return one row of a table of runs, by `COLUMNS`."""
    by_role = {
        role: ", ".join(
            f"{name} {signed(value)}"
            for name, value in metrics.gains.items()
            if metrics.roles.get(name, "judge") == role
        )
        for role in ROLES
    }
    budget = f" of {short(metrics.budget)}" if metrics.budget is not None else ""
    diversity = "-" if metrics.diversity is None else f"{metrics.diversity:.0%}"
    return [
        metrics.name, str(metrics.seed), metrics.state, _iterations(metrics), signed(metrics.quality),
        by_role["reward"] or "-", by_role["judge"] or "-", short(metrics.drift) + budget, diversity,
        metrics.guard.state, duration(metrics.seconds),
    ]  # fmt: skip


def list_cells(metrics: RunMetrics) -> list[str]:
    """Return one row of the narrower list of runs, by `LIST_COLUMNS`."""
    return [
        metrics.name, str(metrics.seed), metrics.state, _iterations(metrics),
        signed(metrics.mean_gain("reward")), signed(metrics.mean_gain("judge")), short(metrics.drift),
        metrics.guard.state, duration(metrics.seconds), metrics.path or f"mlflow:{metrics.mlflow_run_id}",
    ]  # fmt: skip


def seed_cells(group: SeedGroup) -> list[str]:
    """Return one row of the means over seeds, by `SEED_COLUMNS`."""
    gains = ", ".join(f"{name} {_spread(spread)}" for name, spread in group.gains.items())
    seconds = "-" if group.seconds is None else duration(group.seconds.mean)
    seeds = ", ".join(map(str, group.seeds)) or "-"
    quality, drift = _spread(group.quality), _spread(group.drift, plus=False)
    return [group.label, seeds, group.left_out or "-", quality, drift, gains or "-", seconds]


def difference_table(labels: Sequence[str], differences: Mapping[str, Sequence[str | None]]) -> Table:
    """Return the parameters that differ, one column per run."""
    rows = [[key, *("-" if value is None else value for value in values)] for key, values in differences.items()]
    return ["parameter", *labels], rows


def iteration_table(record: RunRecord) -> Table:
    """Return the newest iterations as text, for reading, copying and screen readers."""
    names = [(role, name) for role in ROLES for name in record.metrics_by_role[role]]
    columns = ["iteration", *(f"{role} {name}" for role, name in names), "rms drift", "anchor weight", "seconds"]
    keys = [*(f"{role}/{name}/mean" for role, name in names), "drift/rms", "anchor/weight", "time/iteration"]
    rows = [
        [str(int(row["iteration"]) + 1), *(short(row.get(key)) for key in keys)] for row in record.rows[-_MOST_ROWS:]
    ]
    return columns, rows


def phase_table(record: RunRecord) -> Table:
    """Return the seconds of each phase and the resources of its role; no rows if no time was recorded."""
    sums = {phase: sum(row.get(f"time/{phase}") or 0.0 for row in record.rows) for phase in PHASES}
    whole = sum(row.get("time/iteration") or 0.0 for row in record.rows)
    sums["other"] = max(0.0, whole - sum(sums.values()))
    whole, count, reserved = sum(sums.values()), len(record.rows), _reserved(record.config)
    rows = [
        [
            phase, duration(seconds), f"{seconds / whole:.0%}", duration(seconds / count), _idle(record, phase),
            reserved.get(phase, "-"),
        ]
        for phase, seconds in sums.items()
        if whole
    ]  # fmt: skip
    return PHASE_COLUMNS, rows


def _idle(record: RunRecord, phase: str) -> str:
    """Mean share of an iteration in which the role of a phase had no work."""
    shares = [share for row in record.rows if (share := row.get(f"idle/{_ROLE_OF.get(phase)}")) is not None]
    return f"{fmean(shares):.0%}" if shares else "-"


def trajectory_table(artefacts: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Return the result of each measurement and whether its trajectory was adopted."""
    rows = []
    for name, artefact in artefacts:
        # Artefacts of earlier versions do not name the validation that decided.
        gate = artefact.get("gate") or next(reversed(artefact.get("gates") or []), None)
        ratio = f"{gate['ratio']:.3f}" if gate else "-"
        outcome = "adopted" if artefact.get("adopted") else "kept"
        rows.append([name, short(artefact.get("j0")), short(artefact.get("j1")), ratio, outcome])
    return TRAJECTORY_COLUMNS, rows


def _iterations(metrics: RunMetrics) -> str:
    return f"{metrics.iterations}" + (f"/{metrics.total}" if metrics.total is not None else "")


def _reserved(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the resources of each role, from the configuration."""
    rollout, rewards, learner = (config.get(name) or {} for name in ("rollout", "rewards", "learner"))
    metrics = len(rewards.get("train") or ()) + len(rewards.get("judges") or ())
    roles: Sequence[tuple[str, Any, Mapping[str, Any], str]] = (
        ("rollout", rollout.get("num_workers"), rollout, "worker"),
        ("reward", (rewards.get("replicas") or 0) * metrics, rewards, "replica"),
        ("learn", learner.get("num_ranks"), learner, "rank"),
    )
    return {
        phase: f"{count} x {short(section.get(f'cpus_per_{unit}'))} CPU, {short(section.get(f'gpus_per_{unit}'))} GPU"
        for phase, count, section, unit in roles
        if count
    }


def _spread(spread: Spread | None, *, plus: bool = True) -> str:
    if spread is None:
        return "-"
    mean = signed(spread.mean) if plus else short(spread.mean)
    return mean if spread.std is None else f"{mean} ± {spread.std:.2g}"
