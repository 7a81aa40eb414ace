"""`acpo eval`: score a model or images with judges on a suite of prompts, with confidence intervals."""

from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app, interruption, say


@app.command("eval")
def evaluate_command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Run, configuration, pipeline folder, toy, or images.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    suite: Annotated[
        str | None, typer.Option(help="drawbench, parti, toy, none, or a .txt, .csv, .tsv or .parquet file.")
    ] = None,
    judges: Annotated[
        list[str] | None,
        typer.Option("--judges", "--judge", help="Judges as in `acpo score`, separated by commas or repeated."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="base (of a run), or another model, run or set of images.")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="Checkpoint of a run: newest, best (by its judges), or an iteration.")
    ] = "newest",
    samples_per_prompt: Annotated[int, typer.Option(min=1, help="Samples per prompt.")] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts or images, spread evenly over all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; default: evaluations/SOURCE-SUITE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the evaluation in the folder.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Rollout workers; more than one requires Ray.")] = 1,
    backend: Annotated[str, typer.Option(help="local, ray or auto.")] = "auto",
    features: Annotated[
        str, typer.Option(help="low-pass[:SIZE], inception:FILE, efficientnet-lite0:FILE or network:MODULE:CLASS:FILE.")
    ] = "low-pass",
    drift: Annotated[
        int, typer.Option(min=0, help="Samples for the drift of a run from its base model; 0 disables it.")
    ] = 32,
    prompt_column: Annotated[str, typer.Option(help="Column of prompts.")] = "prompt",
    category_column: Annotated[str, typer.Option(help="Column of categories.")] = "category",
    image_column: Annotated[str, typer.Option(help="Column of images in a parquet file.")] = "image",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Score samples of a prompt suite, or existing images, with judges.

    Every judge gets a mean with its 95 % interval over prompts; with --compare also the paired difference on the same
    seeds and the win rate. A failed judge is named with its sample, counted as missing, and makes the exit code 1.
    """
    from acpo_dist.cli.eval_request import Options, request_of
    from acpo_dist.cli.eval_table import show
    from acpo_dist.evaluation.suites.backend import LocalBackend
    from acpo_dist.evaluation.suites.evaluate import evaluate
    from acpo_dist.tracking.console import Console

    console = Console()
    request, config = request_of(
        Options(
            source=source, overrides=tuple(overrides or ()), suite=suite, judges=tuple(judges or ()), compare=compare,
            checkpoint=checkpoint, samples_per_prompt=samples_per_prompt, limit=limit, seed=seed, features=features,
            drift=drift, prompt_column=prompt_column, category_column=category_column, image_column=image_column,
        )
    )  # fmt: skip
    folder = out or Path("evaluations") / "-".join(
        [Path(source).stem or "images", *([request.suite.name] if request.suite else [])]
    )
    chosen = LocalBackend() if not _on_ray(backend, workers, config) else _ray(config, workers)
    try:
        with chosen.open():
            report = evaluate(request, chosen, folder, console, resume=resume)
    except KeyboardInterrupt:
        word, code = interruption()
        say(f"{word}; the same command with --resume continues in {folder}")
        raise typer.Exit(code) from None
    for failure in report["failures"][:20]:
        say(f"no score: {failure['arm']} {failure['image']}, judge {failure['judge']}: {failure['error']}")
    if as_json:
        answer({"folder": str(folder), **report})
    else:
        show(report, folder)
    if report["num_missing"]:
        say(f"{report['num_missing']} scores are missing; they are excluded")
        raise typer.Exit(1)


def _on_ray(backend: str, workers: int, config: Any) -> bool:
    import os

    from acpo_dist.config.relations import module_available
    from acpo_dist.core.errors import UsageError

    if backend not in ("auto", "local", "ray"):
        raise UsageError(f"--backend must be local, ray or auto, found `{backend}`.")
    if backend == "local" and workers > 1:
        raise UsageError(f"--backend local is one process, but --workers is {workers}: use --backend ray.")
    known = config.cluster.address or os.environ.get("RAY_ADDRESS")
    wanted = backend == "ray" or (backend == "auto" and bool(workers > 1 or known))
    if wanted and not module_available("ray"):
        raise UsageError("this evaluation needs Ray, which is not installed: pip install 'acpo-dist[ray]'")
    return wanted


def _ray(config: Any, workers: int) -> Any:
    from actors.evaluation import RayBackend

    return RayBackend(config, workers=workers)
