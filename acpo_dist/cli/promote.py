"""`acpo promote`: register a run in the model registry, with a model card."""

from pathlib import Path
from typing import Annotated

import typer

from acpo_dist.cli.app import answer, app


@app.command("promote")
def promote_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    name: Annotated[str | None, typer.Option(help="Name of the registered model; the run's if not given.")] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow tracking URI; the run's if not given.")] = None,
    checkpoint: Annotated[str, typer.Option(help="best (by its judges), newest, or an iteration.")] = "best",
    evaluation: Annotated[list[Path] | None, typer.Option(help="Folder of `acpo eval` for the card; repeat.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Promote even if the guard is not clean; tags and card state it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Register the run's best checkpoint by its judges, if the guard is clean, with a model card."""
    from acpo_dist.analysis.release.promote import promote
    from acpo_dist.tracking.console import Console

    done = promote(run, name=name, uri=uri, checkpoint=checkpoint, force=force, evaluations=evaluation or [])
    if as_json:
        answer(
            {
                "model": done.version.name, "version": done.version.version, "model_uri": done.version.model_uri,
                "mlflow_uri": done.version.uri, "mlflow_run_id": done.version.run_id, "folder": str(done.folder),
                "card": str(done.card), "iteration": done.iteration, "clean": done.verdict.clean,
                "objections": list(done.verdict.objections), "forced": done.forced,
            }
        )  # fmt: skip
        return
    console = Console()
    forced = ", BY FORCE: the guard is not clean" if done.forced else ""
    console.message(f"{done.version.model_uri} at {done.version.uri}: iteration {done.iteration}{forced}; {done.card}")
