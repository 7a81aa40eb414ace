"""`acpo compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app

_SIDE_BY_SIDE = 4
"""Up to so many runs are columns, as their parameters are; more are rows."""


@app.command("compare")
def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run folders, or folders of runs.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Every run of this MLflow experiment too.")] = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI; by default MLFLOW_TRACKING_URI, or runs/mlflow.db.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Quality against drift: FILE.png, or all of it as FILE.html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with the whole comparison.")] = False,
) -> None:
    """Compare runs: quality, judges, drift, diversity, cost; what differs between them; means over seeds."""
    from acpo_dist.analysis.report.cells import COLUMNS, SEED_COLUMNS, run_cells, seed_cells
    from acpo_dist.analysis.report.compare import differences, labels_of, pareto_front, seed_groups
    from acpo_dist.analysis.report.find import gather
    from acpo_dist.analysis.report.metrics import metrics_of
    from acpo_dist.analysis.report.record import require_rows
    from acpo_dist.analysis.report.terminal import show_table
    from acpo_dist.core.errors import UsageError

    if out is not None and out.suffix.lower() not in (".png", ".html"):
        raise UsageError(f"--out must end in .png or .html, found {out}")
    records = [require_rows(record) for record in gather(runs or [], experiment, uri)]
    metrics, labels = [metrics_of(record) for record in records], labels_of(records)
    groups, changed = seed_groups(records, metrics, labels), differences(records)
    if out is not None:
        _write(out, records, metrics, labels, groups)
    if as_json:
        points = {
            i: (f.drift, f.quality) for i, f in enumerate(metrics) if f.drift is not None and f.quality is not None
        }
        order = list(points)
        front = [labels[order[place]] for place in pareto_front([points[index] for index in order])]
        rows = [{"label": label, **each.to_mapping()} for label, each in zip(labels, metrics, strict=True)]
        answer(
            {
                "runs": rows, "differences": changed, "seed_groups": [group.to_mapping() for group in groups],
                "pareto_front": front, "out": str(out) if out else None,
            }
        )  # fmt: skip
        return
    rows = [[label, *run_cells(each)[1:]] for label, each in zip(labels, metrics, strict=True)]
    if len(rows) <= _SIDE_BY_SIDE:
        show_table(
            f"{len(rows)} runs", ["figure", *labels], [list(column) for column in zip(COLUMNS, *rows, strict=True)][1:]
        )
    else:
        show_table(f"{len(rows)} runs", COLUMNS, rows)
    several = [group for group in groups if len(group.members) > 1]
    if several:
        show_table("mean ± standard deviation over seeds", SEED_COLUMNS, [seed_cells(group) for group in several])
    if changed:
        rows = [[key, *("-" if value is None else value for value in values)] for key, values in changed.items()]
        show_table("parameters that differ", ["parameter", *labels], rows)
    if out is not None:
        typer.echo(str(out))


def _write(out: Path, records: Any, metrics: Any, labels: Any, groups: Any) -> None:
    from acpo_dist.analysis.report.page import render_comparison, write_page
    from acpo_dist.analysis.report.pareto import save_pareto
    from acpo_dist.analysis.report.view import RunView

    if out.suffix.lower() == ".png":
        save_pareto(out, metrics, groups)
        return
    views = [
        RunView(label=label, record=record, metrics=each)
        for label, record, each in zip(labels, records, metrics, strict=True)
    ]
    write_page(out, render_comparison(views))
