"""`acpo report`."""

from pathlib import Path
from typing import Annotated

import typer

from acpo_dist.cli.app import answer, app


@app.command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html in the run, or beside the first of several.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in the gallery.")] = 12,
    per_prompt: Annotated[int, typer.Option(min=1, help="Seeds per prompt; diversity needs two.")] = 2,
    at: Annotated[
        str, typer.Option(help="Checkpoint of the images: export, last, best (by the judges), or an iteration.")
    ] = "export",
    samples: Annotated[bool, typer.Option(help="Render images and measure drift by timestep.")] = True,
    mlflow: Annotated[bool, typer.Option(help="Add the page to the runs in MLflow.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with the metrics.")] = False,
) -> None:
    """Write one HTML file about runs: quality against drift, judges, guard, time, images. Works offline."""
    from acpo_dist.analysis.report.build import GalleryOptions, build_report
    from acpo_dist.analysis.report.metrics import verdict
    from acpo_dist.tracking.console import Console

    console = Console()
    options = GalleryOptions(prompts=prompts, per_prompt=per_prompt, at=at) if samples else None
    made = build_report(runs, out, options, track=mlflow, console=console)
    if as_json:
        rows = [
            {
                "label": view.label, **view.metrics.to_mapping(), "notes": list(view.notes),
                "images": [
                    {"prompt": pair.base.prompt, "seed": pair.base.seed, "gain": pair.gain, "base": str(pair.base.file),
                     "tuned": str(pair.tuned.file), "base_scores": pair.base.scores, "tuned_scores": pair.tuned.scores}
                    for pair in (view.gallery.pairs if view.gallery else ())
                ],
                "in_mlflow": made.tracked.get(view.label),
            }
            for view in made.views
        ]  # fmt: skip
        answer({"report": str(made.path), "runs": rows})
        return
    for view in made.views:
        for note in view.notes:
            console.message(f"{view.label}: {note}")
        console.message(f"{view.label}: {verdict(view.metrics)[1]}")
    added = [label for label, done in made.tracked.items() if done]
    console.message(f"{made.path}" + (f"; added to MLflow: {', '.join(added)}" if added else ""))
