"""`acpo score`: real pictures through any reward."""

from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app


@app.command("score")
def score(
    images: Annotated[list[Path], typer.Argument(help="Pictures, folders of pictures, or parquet files.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="two_stream, strided_judge, pyiqa:NAME or module:Class; repeat.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weights file for the metric, where it takes one.")] = None,
    column: Annotated[str, typer.Option(help="Picture column of a parquet file.")] = "image",
    prompt: Annotated[str, typer.Option(help="Prompt for metrics that read one.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first so many pictures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with every score.")] = False,
) -> None:
    """Score real pictures, losslessly, each on its own; raw scores in the metric's own unit."""
    from itertools import islice
    from statistics import fmean

    from acpo_dist.data.images import read_images
    from acpo_dist.rewards.worker import RewardWorker
    from acpo_dist.tracking.console import Console

    console = Console()
    workers = [
        RewardWorker(_section(name, weights), model=None, cut="image", wire_dtype="float32")
        for name in metric or ["two_stream", "strided_judge"]
    ]
    rows: list[dict[str, Any]] = []
    with console.phase("score", limit) as advance:
        for name, picture in islice(read_images(images, column=column), limit):
            rows.append(
                {"image": name, **{worker.name: worker.score(picture[None], [prompt])[0] for worker in workers}}
            )
            advance(1)
    names = [worker.name for worker in workers]
    means = {name: fmean(row[name] for row in rows) for name in names}
    if as_json:
        answer({"images": len(rows), "mean": means, "scores": rows})
        return
    table = [[row["image"], *(f"{row[name]:.4f}" for name in names)] for row in rows]
    console.table(
        f"{len(rows)} pictures", ["image", *names], [*table, ["mean", *(f"{means[name]:.4f}" for name in names)]]
    )


def _section(name: str, weights: str | None) -> Any:
    """The metric's section; `pyiqa:NAME` is short for type pyiqa, metric NAME."""
    from acpo_dist.config.section import describe
    from acpo_dist.core.errors import RewardConfigError
    from acpo_dist.core.registry import REWARDS, resolve

    kind, _, rest = name.partition(":")
    values = {"type": "pyiqa", "metric": rest} if kind == "pyiqa" else {"type": name}
    if weights:
        values["weights"] = weights
    metric = resolve("reward", REWARDS, values["type"])
    from pydantic import ValidationError

    try:
        section = metric.Config.model_validate(values)
    except ValidationError as error:
        raise RewardConfigError(f"--metric {name}: {describe(error, metric.Config)}") from error
    reason = metric.unusable(section)
    if reason:
        raise RewardConfigError(f"--metric {name}: {reason}")
    return section
