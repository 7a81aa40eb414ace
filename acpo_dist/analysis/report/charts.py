"""Charts of a report as plotly figures in the light colour scheme; the page's script switches to the dark one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from acpo_dist.analysis.report.compare import SeedGroup, pareto_front
from acpo_dist.analysis.report.drift_map import DriftMap
from acpo_dist.analysis.report.metrics import GUARD_KEYS, PHASES, GuardView, RunMetrics
from acpo_dist.analysis.report.record import ROLES, RunRecord
from acpo_dist.tracking.panel import SIGMA

LIGHT = {
    "page": "#f4f5f7", "card": "#ffffff", "ink": "#1a1d21", "soft": "#555c66", "line": "#d8dce1", "faint": "#e9ebee",
    "good": "#0a6b43", "caution": "#8a5200", "bad": "#b3261e", "focus": "#0b57d0", "tone-0": "#0b57a8",
    "tone-1": "#b04000", "tone-2": "#00704f", "tone-3": "#8b2f8b", "tone-4": "#75600a", "tone-5": "#4a4f57",
}  # fmt: skip
"""Colours by name. Text and curves have a contrast of at least 4.5 on page and card; no two names share a colour."""
DARK = {
    "page": "#101317", "card": "#191d23", "ink": "#eceff3", "soft": "#a9b2bd", "line": "#39414b", "faint": "#262c34",
    "good": "#56d69a", "caution": "#ffb84d", "bad": "#ff8a80", "focus": "#8ab4f8", "tone-0": "#6fb3ff",
    "tone-1": "#ffa05c", "tone-2": "#4fd3a4", "tone-3": "#ec9cec", "tone-4": "#e2c94c", "tone-5": "#c2c8d0",
}  # fmt: skip
SMOOTHING = 0.3
"""Share of the newest iteration in the running means of the scatter plot: the guard's default."""
_TONES = [LIGHT[f"tone-{index}"] for index in range(6)]
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "x")
DRIFT_UNITS = {"eps": "noise units", "v": "velocity units", "x0": "clean-image units"}
_TRAIL_POINTS = 60
_MOST_TRAJECTORIES = 6
_MOST_TEXTS = 9
"""Largest number of columns of a heat map whose cells show their values."""

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart embedded in the page."""

    label: str
    """Text alternative for screen readers."""
    figure: Mapping[str, Any]
    """Plotly's `data` and `layout` as JSON-compatible data."""


def quality_against_drift(
    records: Sequence[RunRecord], metrics: Sequence[RunMetrics], labels: Sequence[str], groups: Sequence[SeedGroup]
) -> Chart | None:
    """Trail of running means and final point of each run, means over seeds, Pareto front and budgets.

    Args:
        records: the runs.
        metrics: one per run.
        labels: one name per run.
        groups: runs that differ only in their seed; they share a colour and a symbol.
    """
    figure = _new_figure(x_title="rms drift from the base model", hovermode="closest")
    tones = {index: tone for tone, group in enumerate(groups) for index in group.members}
    final: list[tuple[float, float]] = []
    for index, (record, each, label) in enumerate(zip(records, metrics, labels, strict=True)):
        style = {"color": _cycle(_TONES, tones[index]), "symbol": _cycle(_SYMBOLS, tones[index])}
        shared = {"name": label, "legendgroup": label, "hovertemplate": "%{text}<extra></extra>"}
        trail = _trail(record, label)
        if trail:
            drift, quality, texts = (list(column) for column in zip(*trail, strict=True))
            figure.add_scatter(
                x=drift, y=quality, text=texts, mode="lines+markers", opacity=0.5, line={"width": 1},
                marker={**style, "size": 4}, showlegend=False, **shared,
            )  # fmt: skip
        if each.drift is not None and each.quality is not None:
            when = "final weights" if each.final else "last five iterations"
            text = f"{label}, {when}: gain {each.quality:+.3f}, drift {each.drift:.3g}"
            figure.add_scatter(
                x=[each.drift], y=[each.quality], text=[text], mode="markers",
                marker={**style, "size": 12, "line": {"width": 1.5, "color": LIGHT["card"]}}, **shared,
            )  # fmt: skip
            final.append((each.drift, each.quality))
    for tone, group in enumerate(groups):
        if len(group.counted) > 1 and group.drift is not None and group.quality is not None:
            name = f"{group.label}, mean ± std of {len(group.counted)} seeds"
            figure.add_scatter(
                x=[group.drift.mean], y=[group.quality.mean], text=[name], name=name, mode="markers",
                error_x={"array": [group.drift.std]}, error_y={"array": [group.quality.std]},
                marker={"color": _cycle(_TONES, tone), "symbol": "star", "size": 14},
                hovertemplate="%{text}: %{y:+.3f} at %{x:.3g}<extra></extra>",
            )  # fmt: skip
    front = sorted(final[place] for place in pareto_front(final))
    if len(front) > 1:
        figure.add_scatter(
            x=[drift for drift, _ in front], y=[quality for _, quality in front], name="Pareto front", mode="lines",
            line={"dash": "dash", "width": 1, "color": LIGHT["soft"]}, hoverinfo="skip",
        )  # fmt: skip
    for budget in sorted({each.budget for each in metrics if each.budget is not None}):
        _limit(figure, f"budget {budget:.3g}", budget, upright=True)
    judged = all(record.metrics_by_role["judge"] for record in records)
    return _chart(figure, y_title=f"gain of the {'judges' if judged else 'rewards'}, base {SIGMA}")


def gains_over_time(record: RunRecord) -> Chart | None:
    """Plot rewards and judges in base standard deviations, or raw means if the normalisers are unknown."""
    known = bool(record.normalisers) or any(key.endswith("/gain") for row in record.rows[:1] for key in row)
    series = {
        f"{role} {name}": [
            (_done(row), record.gain_of(role, name, row) if known else row.get(f"{role}/{name}/mean"))
            for row in record.rows
        ]
        for role in ROLES
        for name in record.metrics_by_role[role]
    }
    limits = {"base model": 0.0} if known else {}
    return _lines(series, y_title=f"gain, base {SIGMA}" if known else "mean score", limits=limits)


def drift_over_time(record: RunRecord, metrics: RunMetrics) -> Chart | None:
    """Plot the rms drift against its budget."""
    limits = {f"budget {metrics.budget:.3g}": metrics.budget} if metrics.budget is not None else {}
    return _lines({"rms drift": _points(record, "drift/rms")}, y_title="rms drift", limits=limits)


def anchor_over_time(record: RunRecord) -> Chart | None:
    """Plot the anchor weight set by the controller; None if there is no anchor."""
    if not any(row.get("anchor/weight") for row in record.rows):
        return None
    return _lines({"anchor weight": _points(record, "anchor/weight")}, y_title="anchor weight")


def guard_over_time(record: RunRecord) -> Chart | None:
    """Plot the largest rule of each kind as a share of its stop limit."""
    kinds: dict[str, list[str]] = {}
    for key in record.rows[-1]:
        if key.startswith("guard/") and key not in GUARD_KEYS:
            kinds.setdefault(key.split("/")[1], []).append(key)
    series = {
        kind.replace("_", " "): [(_done(row), _largest(row, keys)) for row in record.rows]
        for kind, keys in kinds.items()
    }
    return _lines(series, y_title="share of the stop limit", limits={"stop limit": 1.0})


def seconds_over_time(record: RunRecord) -> Chart | None:
    """Plot the seconds of each phase."""
    return _lines({phase: _points(record, f"time/{phase}") for phase in PHASES}, y_title="seconds")


def trajectories(artefacts: Sequence[tuple[str, Mapping[str, Any]]]) -> Chart | None:
    """Plot the change of the noise levels of each measurement relative to the run's first trajectory.

    Args:
        artefacts: (name, VRG artefact), oldest first.
    """
    start = _sigmas(artefacts[0][1]["before"])
    levels = {name: _sigmas(artefact["trajectory"]) for name, artefact in artefacts[-_MOST_TRAJECTORIES:]}
    series = {
        name: [(step, 100 * (now / then - 1)) for step, (now, then) in enumerate(zip(sigmas, start, strict=True))]
        for name, sigmas in levels.items()
        if len(sigmas) == len(start)
    }
    return _lines(series, x_title="denoise step, from noise to image", y_title="change of sigma, %")


def drift_by_timestep(drift: DriftMap) -> Chart | None:
    """Plot mean squared drift by timestep and iteration on a logarithmic colour scale; late timesteps at the bottom."""
    order = sorted(range(len(drift.timesteps)), key=lambda index: drift.timesteps[index])
    rows = [drift.values[index] for index in order]
    logs = [[math.log10(value) if value else None for value in row] for row in rows]
    known = [value for row in logs for value in row if value is not None]
    if not known:
        return None
    unit = f"mean squared drift, {DRIFT_UNITS.get(drift.space, drift.space)}"
    ticks = [min(known) + share * (max(known) - min(known)) for share in (0, 0.5, 1)]
    timesteps, iterations = [str(drift.timesteps[index]) for index in order], [str(i) for i in drift.iterations]
    figure = _new_figure(x_title="iteration", hovermode="closest")
    figure.add_heatmap(
        x=iterations, y=timesteps, z=logs, colorscale="Cividis", xgap=1, ygap=1,
        text=[["" if value is None else f"{value:.2g}" for value in row] for row in rows],
        texttemplate="%{text}" if len(iterations) <= _MOST_TEXTS else None,
        customdata=[
            ["" if value is None else f"timestep {timestep}, iteration {iteration}: {value:.3g}"
             for iteration, value in zip(iterations, row, strict=True)]
            for timestep, row in zip(timesteps, rows, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
        colorbar={"thickness": 9, "tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks]},
    )  # fmt: skip
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category")
    figure.update_layout(height=200 + 20 * len(timesteps))
    return _chart(figure, y_title="timestep", values=unit)


def guard_rules(guard: GuardView) -> Chart | None:
    """Plot every rule as a share of its stop limit, with a mark at its warn limit."""
    words = ["over" if r.share >= 1 else "warns" if r.share >= r.warn_share else "ok" for r in guard.rules]
    colours = [LIGHT[{"over": "bad", "warns": "caution", "ok": "tone-0"}[word]] for word in words]
    names = [rule.rule.replace("_", " ") for rule in guard.rules]
    texts = [f"{rule.share:.0%} · {word}" for rule, word in zip(guard.rules, words, strict=True)]
    figure = _bars(names, [rule.share for rule in guard.rules], texts, colours)
    figure.add_scatter(
        x=[rule.warn_share for rule in guard.rules], y=names, mode="markers", hoverinfo="skip",
        marker={"symbol": "line-ns-open", "size": 14, "color": LIGHT["ink"]},
    )  # fmt: skip
    _limit(figure, "stop limit", 1.0, upright=True)
    figure.update_xaxes(title="share of the stop limit", tickformat=".0%")
    return _chart(figure, y_title="", values="guard rules")


def content_shifts(shifts: Mapping[str, float]) -> Chart | None:
    """Plot the shift of each content statistic in standard deviations of the base images."""
    texts = [f"{value:+.2f} {SIGMA}" for value in shifts.values()]
    figure = _bars([name.replace("_", " ") for name in shifts], list(shifts.values()), texts, _TONES[0])
    figure.update_xaxes(title=f"shift, {SIGMA} of the base images")
    return _chart(figure, y_title="", values="content statistics")


def _lines(
    series: Mapping[str, Points], *, y_title: str, x_title: str = "iteration", limits: Mapping[str, float] | None = None
) -> Chart | None:
    """Plot curves over a common x; None is a gap in a curve."""
    figure = _new_figure(x_title=x_title, hovermode="x unified")
    for tone, (name, points) in enumerate(series.items()):
        if any(y is not None for _, y in points):
            figure.add_scatter(
                x=[x for x, _ in points], y=[y for _, y in points], name=name, mode="lines+markers",
                line={"color": _cycle(_TONES, tone), "dash": _cycle(_DASHES, tone), "width": 2},
                marker={"symbol": _cycle(_SYMBOLS, tone), "size": 6, "maxdisplayed": 8}, hovertemplate="%{y:.4g}",
            )  # fmt: skip
    for name, value in (limits or {}).items():
        _limit(figure, name, value, upright=False)
    return _chart(figure, y_title=y_title)


def _bars(names: Sequence[str], values: Sequence[float], texts: Sequence[str], colour: Any) -> go.Figure:
    figure = _new_figure(x_title="", hovermode="closest")
    figure.add_bar(
        x=values, y=names, text=texts, orientation="h", marker={"color": colour}, cliponaxis=False,
        hovertemplate="%{y}: %{text}<extra></extra>", textposition="outside",
    )  # fmt: skip
    # Space for the labels beside the bars.
    low, high = 1.4 * min([0.0, *values]), 1.4 * max([0.0, *values])
    figure.update_xaxes(range=[low, max(high, 1.1)])
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(height=110 + 26 * len(names), showlegend=False)
    return figure


def _new_figure(*, x_title: str, hovermode: str) -> go.Figure:
    clear = "rgba(0,0,0,0)"
    axis = {
        "gridcolor": LIGHT["faint"], "zerolinecolor": LIGHT["soft"], "linecolor": LIGHT["soft"], "automargin": True,
        "title": {"standoff": 8},
    }  # fmt: skip
    figure = go.Figure(
        layout={
            "template": "none", "height": 320, "hovermode": hovermode, "showlegend": True, "dragmode": False,
            "paper_bgcolor": clear, "plot_bgcolor": clear, "margin": {"l": 46, "r": 14, "t": 26, "b": 40},
            "font": {"color": LIGHT["soft"], "size": 12, "family": "system-ui, DejaVu Sans, sans-serif"},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "hoverlabel": {"bgcolor": LIGHT["card"], "font": {"color": LIGHT["ink"]}},
            "modebar": {"bgcolor": clear, "color": LIGHT["soft"]}, "xaxis": axis | {"zeroline": False}, "yaxis": axis,
        }
    )  # fmt: skip
    figure.update_xaxes(title_text=x_title)
    return figure


def _limit(figure: go.Figure, name: str, value: float, *, upright: bool) -> None:
    """Draw a labelled line across the chart, at an x or at a y."""
    add, place = (figure.add_vline, "top right") if upright else (figure.add_hline, "top right")
    add(
        value, line={"dash": "dot", "width": 1.5, "color": LIGHT["ink"]}, annotation_text=name,
        annotation_position=place, annotation_font={"color": LIGHT["ink"], "size": 12},
    )  # fmt: skip


def _chart(figure: go.Figure, *, y_title: str, values: str = "") -> Chart | None:
    """Return the finished chart, or None without any value; `values` names the quantity that is not on an axis."""
    traces: Any = figure.data
    shown = [trace for trace in traces if trace.hoverinfo != "skip"]
    if not any(len(trace.y) for trace in shown):
        return None
    figure.update_yaxes(title_text=y_title)
    names = ", ".join(dict.fromkeys(trace.name for trace in shown if trace.name))
    x_title = figure.layout.xaxis.title.text
    label = f"{', '.join(filter(None, (values, y_title)))} by {x_title}" + (f": {names}" if names else "")
    return Chart(label=label, figure=figure.to_plotly_json())


def _sigmas(trajectory: Mapping[str, Any]) -> list[float]:
    """Return the noise levels except the last, which is 0."""
    return [math.sqrt(1 / value - 1) for value in trajectory["alpha_bars"] if 0 < value < 1]


def _trail(record: RunRecord, label: str) -> list[tuple[float, float, str]]:
    """Return (drift, quality, text): running means by iteration, thinned."""
    role = "judge" if record.metrics_by_role["judge"] else "reward"
    points: list[tuple[float, float, str]] = []
    drift = quality = math.nan
    for row in record.rows:
        gain, rms = record.mean_gain(row, role), row.get("drift/rms")
        if gain is None or rms is None:
            continue
        drift = drift + SMOOTHING * (float(rms) - drift) if points else float(rms)
        quality = quality + SMOOTHING * (gain - quality) if points else gain
        points.append((drift, quality, f"{label}, iteration {_done(row)}: gain {quality:.4g}, drift {drift:.4g}"))
    return points[:: max(1, math.ceil(len(points) / _TRAIL_POINTS))]


def _points(record: RunRecord, key: str) -> list[tuple[float, float | None]]:
    return [(_done(row), row.get(key)) for row in record.rows if key in row]


def _done(row: Mapping[str, Any]) -> int:
    """Return the number of completed iterations after this row, which starts at 1."""
    return int(row["iteration"]) + 1


def _largest(row: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    return max((row[key] for key in keys if row.get(key) is not None), default=None)


def _cycle(values: Sequence[str], index: int) -> str:
    return values[index % len(values)]
