"""`acpo runs`."""

from pathlib import Path
from typing import Annotated

import typer

from acpo_dist.cli.app import answer, app, say


@app.command("runs")
def runs(
    folder: Annotated[Path | None, typer.Argument(help="Folder with runs, at most four levels down.")] = None,
    experiment: Annotated[str | None, typer.Option(help="List the runs of this MLflow experiment instead.")] = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI; by default MLFLOW_TRACKING_URI, or runs/mlflow.db.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with every run.")] = False,
) -> None:
    """List runs: state, iterations, gain of rewards and judges, drift, guard, time."""
    from acpo_dist.analysis.report.find import runs_below, runs_of_experiment
    from acpo_dist.analysis.report.metrics import metrics_of
    from acpo_dist.analysis.report.tables import LIST_COLUMNS, list_cells
    from acpo_dist.tracking.console import print_table

    problems: list[str] = []
    if experiment is not None:
        records = runs_of_experiment(experiment, uri)
    else:
        records, problems = runs_below(folder or Path("runs"))
    for problem in problems:
        say(f"left out: {problem}")
    metrics = [metrics_of(record) for record in records]
    if as_json:
        answer({"runs": [each.to_mapping() for each in metrics], "left_out": problems})
        return
    rows = [list_cells(each) for each in metrics]
    print_table(f"{len(rows)} runs; gains in standard deviations of base samples", LIST_COLUMNS, rows)
