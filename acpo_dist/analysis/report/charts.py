"""The charts of a report, from a run's record."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from acpo_dist.analysis.report.drift_map import DriftMap
from acpo_dist.analysis.report.heat import heat_map
from acpo_dist.analysis.report.metrics import GUARD_KEYS, RunMetrics, metrics_of
from acpo_dist.analysis.report.record import ROLES, RunRecord
from acpo_dist.analysis.report.svg import Limit, Series, Trail, line_chart, scatter_chart, tick_text
from acpo_dist.tracking.panel import SIGMA

SMOOTHING = 0.3
"""Share of the newest iteration in the running means of the scatter plot: the guard's own default."""
PHASES = ("rollout", "reward", "learn", "sync")
_DRIFT_UNITS = {"eps": "noise units", "v": "velocity units", "x0": "clean-image units"}
_TRAIL_POINTS = 60
_MOST_TRAJECTORIES = 6


def tradeoff(records: Sequence[RunRecord], labels: Sequence[str]) -> str:
    """Quality against drift: one trail of running means per run, and where it ended."""
    trails = []
    for index, (record, label) in enumerate(zip(records, labels, strict=True)):
        points = _trail(record)
        metrics = metrics_of(record)
        end = None
        if metrics.drift is not None and metrics.quality is not None:
            how = "final weights" if metrics.final else "last five iterations"
            about = f"{label}, {how}: gain {metrics.quality:+.3f}, drift {metrics.drift:.3g}"
            end = (metrics.drift, metrics.quality, about)
        trails.append(Trail(name=label, points=points, end=end, tone=index))
    budgets = {metrics_of(record).budget for record in records} - {None}
    limits = [
        Limit(name=f"budget {budget:.3g}", value=budget, upright=True) for budget in budgets if budget is not None
    ]
    judged = all(record.metrics_by_role["judge"] for record in records)
    y_label = f"gain of the {'judges' if judged else 'rewards'}, base {SIGMA}"
    return scatter_chart(trails, x_label="rms drift from the base model", y_label=y_label, limits=limits[:1])


def gains_over_time(record: RunRecord) -> str:
    """Rewards and judges in base standard deviations; raw means where those are not known."""
    known = bool(record.normalisers) or any(key.endswith("/gain") for row in record.rows[:1] for key in row)
    series = [
        Series(
            name=f"{role} {name}",
            points=[(_at(row), record.gain_of(role, name, row) if known else row.get(f"{role}/{name}/mean")) for row in
                    record.rows],
            tone=0,
        )
        for role in ROLES
        for name in record.metrics_by_role[role]
    ]  # fmt: skip
    limits = [Limit(name="base model", value=0.0)] if known else []
    return line_chart(
        _toned(series), x_label="iteration", y_label=f"gain, base {SIGMA}" if known else "mean score", limits=limits
    )


def drift_over_time(record: RunRecord, metrics: RunMetrics) -> str:
    """Drift against its budget."""
    limits = [Limit(name=f"budget {metrics.budget:.3g}", value=metrics.budget)] if metrics.budget is not None else []
    return line_chart(
        [_series(record, "drift/rms", "rms drift", 0)], x_label="iteration", y_label="rms drift", limits=limits
    )


def anchor_over_time(record: RunRecord) -> str:
    """Weight that the controller gave the anchor."""
    return line_chart(
        [_series(record, "anchor/weight", "anchor weight", 3)], x_label="iteration", y_label="anchor weight"
    )


def drift_heat(drift: DriftMap) -> str:
    """Mean squared drift by timestep and iteration; late timesteps, where the reward acts, at the bottom."""
    order = sorted(range(len(drift.timesteps)), key=lambda index: -drift.timesteps[index])
    return heat_map(
        [str(drift.timesteps[index]) for index in order], [str(value) for value in drift.iterations],
        [drift.values[index] for index in order], row_label="timestep", column_label="iteration",
        unit=f"mean squared drift, {_DRIFT_UNITS.get(drift.space, drift.space)}",
    )  # fmt: skip


def guard_over_time(record: RunRecord) -> str:
    """The worst rule of each kind as a share of its stop limit."""
    kinds: dict[str, list[str]] = {}
    for key in record.rows[-1]:
        if key.startswith("guard/") and key not in GUARD_KEYS:
            kinds.setdefault(key.split("/")[1], []).append(key)
    series = [
        Series(name=kind.replace("_", " "), points=[(_at(row), _worst(row, keys)) for row in record.rows], tone=0)
        for kind, keys in kinds.items()
    ]
    if not series:
        return '<p class="empty">The guard measured nothing in this run.</p>'
    stop = Limit(name="stop limit", value=1.0)
    return line_chart(_toned(series), x_label="iteration", y_label="share of the stop limit", limits=[stop])


def seconds_over_time(record: RunRecord) -> str:
    """Seconds of each phase."""
    series = [_series(record, f"time/{phase}", phase, 0) for phase in PHASES]
    return line_chart(_toned(series), x_label="iteration", y_label="seconds")


def trajectory_chart(artefacts: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """How far each measurement moved the noise levels from the trajectory that the run began with."""
    series = []
    start = _sigmas(artefacts[0][1]["before"])
    for tone, (name, artefact) in enumerate(artefacts[-_MOST_TRAJECTORIES:]):
        levels = _sigmas(artefact["trajectory"])
        if len(levels) == len(start):
            points = [
                (step, 100 * (now / then - 1)) for step, (now, then) in enumerate(zip(levels, start, strict=True))
            ]
            series.append(Series(name=name, points=points, tone=tone))
    return line_chart(series, x_label="denoise step, from noise to image", y_label="change of sigma, %")


def _sigmas(trajectory: Mapping[str, Any]) -> list[float]:
    """Noise levels but the last, which is 0."""
    return [math.sqrt(1 / value - 1) for value in trajectory["alpha_bars"] if 0 < value < 1]


def _trail(record: RunRecord) -> list[tuple[float, float, str]]:
    """Running means of drift and quality by iteration, thinned."""
    role = "judge" if record.metrics_by_role["judge"] else "reward"
    points: list[tuple[float, float, str]] = []
    mean: tuple[float, float] | None = None
    for row in record.rows:
        quality, drift = record.mean_gain(row, role), row.get("drift/rms")
        if quality is None or drift is None:
            continue
        fresh = (float(drift), quality)
        mean = fresh if mean is None else tuple(a + SMOOTHING * (b - a) for a, b in zip(mean, fresh, strict=True))  # pyright: ignore[reportAssignmentType]
        assert mean is not None
        about = f"{record.name}, iteration {_at(row)}: gain {tick_text(mean[1])}, drift {tick_text(mean[0])}"
        points.append((mean[0], mean[1], about))
    step = max(1, math.ceil(len(points) / _TRAIL_POINTS))
    return points[::step]


def _series(record: RunRecord, key: str, name: str, tone: int) -> Series:
    return Series(name=name, points=[(_at(row), row.get(key)) for row in record.rows if key in row], tone=tone)


def _toned(series: Sequence[Series]) -> list[Series]:
    return [Series(name=each.name, points=each.points, tone=index) for index, each in enumerate(series)]


def _at(row: Any) -> int:
    """Iterations that are done after this row: people count from 1."""
    return int(row["iteration"]) + 1


def _worst(row: Any, keys: Sequence[str]) -> float | None:
    values = [row[key] for key in keys if row.get(key) is not None]
    return max(values) if values else None
