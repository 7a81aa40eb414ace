"""`acpo compare`."""

from pathlib import Path
from typing import Annotated

import typer

from acpo_dist.cli.app import answer, app

_SIDE_BY_SIDE = 4
"""Largest number of runs shown as columns; more are shown as rows."""


@app.command("compare")
def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run folders, or folders of runs.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Also every run of this MLflow experiment.")] = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI; by default MLFLOW_TRACKING_URI, or runs/mlflow.db.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="HTML file with the comparison and its chart.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with the whole comparison.")] = False,
) -> None:
    """Compare runs: quality, judges, drift, diversity, cost; what differs between them; means over seeds."""
    from acpo_dist.analysis.report.compare import differences, labels_of, pareto_front, seed_groups
    from acpo_dist.analysis.report.find import gather
    from acpo_dist.analysis.report.metrics import metrics_of
    from acpo_dist.analysis.report.record import require_rows
    from acpo_dist.analysis.report.tables import COLUMNS, SEED_COLUMNS, difference_table, run_cells, seed_cells
    from acpo_dist.core.errors import UsageError
    from acpo_dist.tracking.console import print_table

    if out is not None and out.suffix.lower() != ".html":
        raise UsageError(f"--out must end in .html, found {out}; the page can save its chart as an image")
    records = [require_rows(record) for record in gather(runs or [], experiment, uri)]
    metrics, labels = [metrics_of(record) for record in records], labels_of(records)
    groups, changed = seed_groups(records, metrics, labels), differences(records)
    if out is not None:
        from acpo_dist.analysis.report.page import RunView, write_page

        views = [
            RunView(label=label, record=record, metrics=each)
            for label, record, each in zip(labels, records, metrics, strict=True)
        ]
        write_page(out, views, panels=False)
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
        print_table(
            f"{len(rows)} runs", ["metric", *labels], [list(column) for column in zip(COLUMNS, *rows, strict=True)][1:]
        )
    else:
        print_table(f"{len(rows)} runs", COLUMNS, rows)
    several = [group for group in groups if len(group.members) > 1]
    if several:
        print_table("mean ± standard deviation over seeds", SEED_COLUMNS, [seed_cells(group) for group in several])
    if changed:
        print_table("parameters that differ", *difference_table(labels, changed))
    if out is not None:
        typer.echo(str(out))
