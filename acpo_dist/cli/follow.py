"""`acpo follow`."""

from pathlib import Path
from typing import Annotated

import typer

from acpo_dist.cli.app import answer, app


@app.command("follow")
def follow(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    once: Annotated[bool, typer.Option(help="Show the newest metrics and exit.")] = False,
    wait_s: Annotated[float, typer.Option(min=1, help="Exit after this many seconds without a new iteration.")] = 600.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object with the newest metrics; implies --once.")
    ] = False,
) -> None:
    """Follow a run of another process: gains, drift, guard and times, live, or one line per iteration."""
    from acpo_dist.analysis.report.follow import show_now, show_until_end
    from acpo_dist.analysis.report.metrics import metrics_of, verdict
    from acpo_dist.analysis.report.record import read_run, require_rows
    from acpo_dist.tracking.console import Console

    record = read_run(run)
    if as_json:
        answer(metrics_of(require_rows(record)).to_mapping())
        return
    console = Console()
    if once:
        show_now(require_rows(record), console)
    else:
        show_until_end(record, console, wait_s=wait_s)
    console.message(verdict(metrics_of(read_run(run)))[1])
