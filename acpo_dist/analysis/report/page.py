"""Write one HTML file that needs no network: styles, scripts, plotly, charts and images are embedded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from acpo_dist.analysis.report import charts, tables
from acpo_dist.analysis.report.compare import differences, seed_groups
from acpo_dist.analysis.report.drift_map import DriftMap
from acpo_dist.analysis.report.gallery import Gallery, embedded, gallery_cards
from acpo_dist.analysis.report.metrics import RunMetrics, verdict
from acpo_dist.analysis.report.record import RunRecord
from acpo_dist.core.files import replace_file
from acpo_dist.core.packages import installed_versions
from acpo_dist.tracking.panel import SIGMA

_SIGNS = {
    "good": ("✓", "Looks sound"),
    "caution": ("!", "Look closer"),
    "bad": ("✕", "Do not ship"),
    "unknown": ("?", "Not known"),
}
_GUARD_TONES = {"quiet": "good", "near a limit": "caution", "over a limit": "bad", "stopped": "bad", "off": "unknown"}


@dataclass(frozen=True, kw_only=True)
class RunView:
    """Contents of the page for one run."""

    label: str
    record: RunRecord
    metrics: RunMetrics
    gallery: Gallery | None = None
    drift: DriftMap | None = None
    trajectories: Sequence[tuple[str, Mapping[str, Any]]] = ()
    """(name, VRG artefact), oldest first."""
    notes: Sequence[str] = ()
    """What is missing, with reasons."""


def write_page(path: Path, views: Sequence[RunView], *, panels: bool = True) -> None:
    """Write the page atomically.

    Args:
        path: the HTML file; its folder is created.
        views: one per run.
        panels: whether the page has a panel per run, or only the comparison.

    Raises:
        OSError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("acpo_dist.analysis.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"signed": tables.signed, "short": tables.short}
    several = len(views) > 1 or not panels
    text = environment.get_template("report.html").render(
        title=f"{len(views)} runs compared" if several else views[0].label,
        lead=", ".join(view.label for view in views)
        if several
        else f"seed {views[0].metrics.seed}, {views[0].metrics.state}",
        views=views if panels else [], comparison=_comparison(views) if several else None,
        data={"runs": [{"label": view.label, **view.metrics.to_mapping()} for view in views]},
        colours={"light": charts.LIGHT, "dark": charts.DARK}, plotly=get_plotlyjs(), made_by=_made_by(), sigma=SIGMA,
        charts=charts, tables=tables, verdict=_verdict, cards=_cards, embedded=embedded, gallery_cards=gallery_cards,
        tradeoff=_tradeoff,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode("utf-8"))


def _comparison(views: Sequence[RunView]) -> dict[str, Any]:
    """Render all runs in one chart and one table, with differing parameters and means over seeds."""
    records, metrics = [view.record for view in views], [view.metrics for view in views]
    labels = [view.label for view in views]
    groups = [group for group in seed_groups(records, metrics, labels) if len(group.members) > 1]
    return {
        "views": views,
        "chart": _tradeoff(views),
        "runs": (tables.COLUMNS, [[view.label, *tables.run_cells(view.metrics)[1:]] for view in views]),
        "seeds": (tables.SEED_COLUMNS, [tables.seed_cells(group) for group in groups]),
        "differences": tables.difference_table(labels, differences(records)),
    }


def _tradeoff(views: Sequence[RunView]) -> charts.Chart | None:
    records, metrics = [view.record for view in views], [view.metrics for view in views]
    labels = [view.label for view in views]
    return charts.quality_against_drift(records, metrics, labels, seed_groups(records, metrics, labels))


def _verdict(metrics: RunMetrics) -> dict[str, str]:
    tone, sentence = verdict(metrics)
    sign, word = _SIGNS[tone]
    return {"tone": tone, "sign": sign, "word": word, "sentence": sentence}


def _cards(metrics: RunMetrics) -> list[dict[str, Any]]:
    """Return one card per key metric; `value` is exact, `shown` is rounded."""
    when = "final weights" if metrics.final else "mean of the last five iterations"
    cards: list[dict[str, Any]] = [
        {
            "title": f"{metrics.roles.get(name, 'judge')} gain", "key": f"gain/{name}", "value": value,
            "shown": f"{tables.signed(value)} {SIGMA}", "text": f"{name}, {when}",
        }
        for name, value in metrics.gains.items()
    ]  # fmt: skip
    share = metrics.drift / metrics.budget if metrics.drift is not None and metrics.budget else None
    budget = f"budget {tables.short(metrics.budget)}" if metrics.budget is not None else "no budget"
    used = "" if share is None else f", {share:.0%} used"
    cards.append(
        {"title": "rms drift", "key": "drift", "value": metrics.drift, "shown": tables.short(metrics.drift),
         "text": budget + used, "share": share}
    )  # fmt: skip
    guard = metrics.guard
    cards.append({"title": "guard", "shown": guard.state, "text": guard.text, "tone": _GUARD_TONES[guard.state]})
    if metrics.diversity is not None:
        text = "distance between images of one prompt, relative to the base model"
        shown = f"{metrics.diversity:.0%}"
        cards.append(
            {"title": "diversity", "key": "diversity", "value": metrics.diversity, "shown": shown, "text": text}
        )
    each = tables.duration(metrics.seconds / metrics.iterations) if metrics.seconds and metrics.iterations else "-"
    text = f"{metrics.iterations} iterations, {each} each"
    shown = tables.duration(metrics.seconds)
    return [*cards, {"title": "time", "key": "seconds", "value": metrics.seconds, "shown": shown, "text": text}]


def _made_by() -> str:
    number = installed_versions(["acpo-dist"]).get("acpo-dist", "(unknown version)")
    return f"Made by acpo {number} on {datetime.now():%Y-%m-%d %H:%M}."
