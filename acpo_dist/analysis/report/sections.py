"""The sections of a report, in the order that people read them."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from acpo_dist.analysis.report import charts
from acpo_dist.analysis.report.cards import guard_bullets, phase_bar, shift_bars, summary_cards, verdict_banner
from acpo_dist.analysis.report.cells import COLUMNS, SEED_COLUMNS, run_cells, seed_cells
from acpo_dist.analysis.report.compare import SeedGroup, differences, seed_groups
from acpo_dist.analysis.report.html import block, figure, folded, grid, short, table
from acpo_dist.analysis.report.metrics import RunMetrics
from acpo_dist.analysis.report.record import ROLES, RunRecord
from acpo_dist.analysis.report.sample_shelf import shelf
from acpo_dist.analysis.report.view import RunView

_MOST_ROWS = 500


def comparison(views: Sequence[RunView]) -> str:
    """All runs in one chart and one table, what differs between them, and means over seeds."""
    records, metrics = [view.record for view in views], [view.metrics for view in views]
    labels = [view.label for view in views]
    rows = [[label, *run_cells(each)[1:]] for label, each in zip(labels, metrics, strict=True)]
    said = "".join(f"<h3>{escape(view.label)}</h3>{verdict_banner(view.metrics)}" for view in views)
    parts = [
        grid(
            figure(
                "Quality against drift", charts.tradeoff(records, labels),
                hint="Up is better, left is nearer the base model. Trails are running means by iteration.",
            ),
            figure("In one sentence", said),
        ),
        table(COLUMNS, rows, label="Runs"),
    ]  # fmt: skip
    groups = [group for group in seed_groups(records, metrics, labels) if len(group.members) > 1]
    if groups:
        parts.append("<h3>Over seeds</h3>" + seed_table(groups))
    found = differences(records)
    different = [[key, *("-" if value is None else value for value in values)] for key, values in found.items()]
    if different:
        title = f"Parameters that differ ({len(different)})"
        parts.append(folded(title, table(["parameter", *labels], different, label="Parameters that differ")))
    return block("Runs side by side", *parts)


def run_panel(view: RunView, index: int, *, several: bool) -> str:
    """Everything about one run."""
    record, metrics = view.record, view.metrics
    notes = "".join(f"<li>{escape(note)}</li>" for note in view.notes)
    parts = [
        verdict_banner(metrics),
        summary_cards(metrics),
        f'<ul class="notes" aria-label="What is missing">{notes}</ul>' if notes else "",
        _quality(view, several=several),
        _images(view, index),
        _drift(view),
        _guard(record, metrics),
        _trajectories(view),
        _time(record),
        folded("Figures by iteration", iteration_table(record)),
    ]
    role = f' role="tabpanel" aria-labelledby="tab-{index}" tabindex="0"' if several else ""
    hidden = " hidden" if several and index else ""
    return f'<div class="run" id="run-{index}"{role}{hidden}>{"".join(parts)}</div>'


def seed_table(groups: Sequence[SeedGroup]) -> str:
    """Means and standard deviations of runs that differ only in their seed."""
    rows = [seed_cells(group) for group in groups]
    return table(SEED_COLUMNS, rows, label="Means over seeds")


def iteration_table(record: RunRecord) -> str:
    """The newest rows as text: for reading, copying and screen readers."""
    names = [(role, name) for role in ROLES for name in record.metrics_by_role[role]]
    columns = ["iteration", *(f"{role} {name}" for role, name in names), "rms drift", "anchor weight", "seconds"]
    rows = [
        [
            str(int(row["iteration"]) + 1),
            *(short(row.get(f"{role}/{name}/mean")) for role, name in names),
            short(row.get("drift/rms")), short(row.get("anchor/weight")), short(row.get("time/iteration")),
        ]
        for row in record.rows[-_MOST_ROWS:]
    ]  # fmt: skip
    return table(columns, rows, label="Figures by iteration")


def _quality(view: RunView, *, several: bool) -> str:
    record = view.record
    judges = " The judges never drive the update." if record.metrics_by_role["judge"] else ""
    over_time = figure(
        "Rewards and judges", charts.gains_over_time(record),
        hint=f"Mean of each iteration's samples.{judges}",
    )  # fmt: skip
    hint = "Up is better, left is nearer the base model; the trail is a running mean by iteration."
    against = figure("Quality against drift", charts.tradeoff([record], [view.label]), hint=hint)
    return block("Quality", grid(over_time, against))


def _images(view: RunView, index: int) -> str:
    gallery = view.gallery
    if gallery is None:
        return ""
    hint = "Same prompt, same seed, same trajectory, with base and tuned weights. Drag, or use the arrow keys."
    return block("Images", shelf(gallery, index), hint=hint)


def _drift(view: RunView) -> str:
    parts = [figure("Drift from the base model", charts.drift_over_time(view.record, view.metrics))]
    if view.drift is not None:
        source = view.drift.source[0].upper() + view.drift.source[1:] + "."
        parts.append(figure("Where it drifted", charts.drift_heat(view.drift), hint=source))
    if any(row.get("anchor/weight") for row in view.record.rows):
        parts.append(figure("Weight of the anchor", charts.anchor_over_time(view.record)))
    if view.gallery is not None:
        hint = "How far plain statistics of the gallery's images moved, in standard deviations of the base's."
        if view.gallery.diversity is not None:
            hint += f" Images of one prompt are {view.gallery.diversity:.0%} as far apart as the base's."
        parts.append(figure("Content and diversity", shift_bars(view.gallery.content), hint=hint))
    return block("Drift and content", grid(*parts))


def _guard(record: RunRecord, metrics: RunMetrics) -> str:
    spoken = [
        f"<li>iteration {int(event['iteration']) + 1}: {escape(_said(event))}</li>"
        for event in record.guard_events
        if isinstance(event.get("iteration"), int)
    ]
    log = folded(f"What the guard said ({len(spoken)})", f"<ul>{''.join(spoken)}</ul>") if spoken else ""
    hint = "Each rule as a share of the limit at which the guard acts; the thin mark is where it warns."
    return block(
        "Guard", f'<p class="lead">{escape(f"{metrics.guard.state}: {metrics.guard.text}")}</p>',
        grid(
            figure("Rules over time", charts.guard_over_time(record)),
            figure("Rules at the end", guard_bullets(metrics.guard), hint=hint),
        ), log,
    )  # fmt: skip


def _said(event: Mapping[str, Any]) -> str:
    reasons = ", ".join(f"{reason['rule']} at {reason['value']:.2f}" for reason in event.get("reasons", []))
    return f"{event.get('action')}: {reasons}"


def _trajectories(view: RunView) -> str:
    if not view.trajectories:
        return ""
    rows = []
    for name, artefact in view.trajectories:
        gates = artefact.get("gates") or []
        validation = f"{gates[-1]['ratio']:.3f}" if gates else "-"
        rows.append([name, short(artefact.get("j0")), short(artefact.get("j1")), validation, _outcome(artefact)])
    columns = ["measured at", "error before", "after", "proof", "outcome"]
    hint = "The proof is the distance to a long reference, new over old: it must be below 1."
    return block(
        "Sampling trajectory",
        grid(
            figure("Noise levels against those at the start", charts.trajectory_chart(view.trajectories)),
            figure("Measurements", table(columns, rows, label="Trajectory measurements"), hint=hint),
        ),
    )  # fmt: skip


def _outcome(artefact: Mapping[str, Any]) -> str:
    return "adopted" if artefact.get("adopted") else "kept"


def _time(record: RunRecord) -> str:
    bar, rows = phase_bar(record)
    if not bar:
        return ""
    columns = ["phase", "in all", "share", "per iteration", "reserves"]
    return block(
        "Time and cost", bar,
        grid(
            figure("By phase", table(columns, rows, label="Time by phase")),
            figure("Over time", charts.seconds_over_time(record)),
        ),
    )  # fmt: skip
