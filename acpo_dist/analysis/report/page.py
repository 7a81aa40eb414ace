"""One HTML file that needs nothing beside it: style, script, charts and images are inside."""

import json
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template

from acpo_dist.analysis.report.sections import comparison, run_panel
from acpo_dist.analysis.report.view import RunView
from acpo_dist.tracking.jsonl import replace_file


def render_page(views: Sequence[RunView]) -> str:
    """The page of one or several runs, with a tab for each of several."""
    several = len(views) > 1
    body = [comparison(views), _tabs(views)] if several else []
    body += [run_panel(view, index, several=several) for index, view in enumerate(views)]
    title = f"{len(views)} runs compared" if several else views[0].label
    lead = (
        ", ".join(view.label for view in views)
        if several
        else f"seed {views[0].metrics.seed}, {views[0].metrics.state}"
    )
    return _shell(title, lead, body, views)


def render_comparison(views: Sequence[RunView]) -> str:
    """The comparison alone; images and curves of each run are in its own report."""
    lead = ", ".join(view.label for view in views)
    return _shell(f"{len(views)} runs compared", lead, [comparison(views)], views)


def write_page(path: Path, text: str) -> None:
    """Write the page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode("utf-8"))


def _tabs(views: Sequence[RunView]) -> str:
    buttons = "".join(
        f'<button role="tab" id="tab-{index}" aria-controls="run-{index}" '
        f'aria-selected="{"true" if index == 0 else "false"}" tabindex="{0 if index == 0 else -1}">'
        f"{escape(view.label)}</button>"
        for index, view in enumerate(views)
    )
    return f'<div class="tabs" role="tablist" aria-label="Runs">{buttons}</div>'


def _shell(title: str, lead: str, body: Sequence[str], views: Sequence[RunView]) -> str:
    data = {"runs": [{"label": view.label, **view.metrics.to_mapping()} for view in views]}
    parts = files("acpo_dist.analysis.report") / "templates"
    style, script, page = (
        (parts / name).read_text(encoding="utf-8") for name in ("report.css", "report.js", "report.html")
    )
    return Template(page).substitute(
        title=escape(title), lead=escape(lead), style=style, script=script, body="\n".join(body), made_by=_made_by(),
        # Inside a script element nothing is unescaped, so its end tag must not appear.
        data=json.dumps(data).replace("<", "\\u003c"),
    )  # fmt: skip


def _made_by() -> str:
    try:
        number = version("acpo-dist")
    except PackageNotFoundError:
        number = "of an unknown version"
    return f"Made by acpo {number} on {datetime.now():%Y-%m-%d %H:%M}."
