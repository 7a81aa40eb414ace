"""`acpo score`: score images with rewards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app, say
from acpo_dist.core.errors import UsageError

_PLOTS = (".png", ".svg", ".pdf")


@app.command("score")
def score(
    images: Annotated[
        list[Path], typer.Argument(help="Images, folders of images, parquet files, or patterns of these in quotes.")
    ],
    reward: Annotated[
        list[str] | None,
        typer.Option("--reward", "--metric", help="Name from `acpo rewards list`, pyiqa:NAME or module:Class; repeat."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weights file of the reward, if it takes one.")] = None,
    column: Annotated[str, typer.Option(help="Image column of a parquet file.")] = "image",
    prompt: Annotated[str, typer.Option(help="Prompt for rewards that read one.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Score only this many images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size; images of a batch have one size.")] = 8,
    csv: Annotated[Path | None, typer.Option(help="Also write the scores to a CSV file.")] = None,
    histogram: Annotated[bool, typer.Option("--histogram", help="Print a histogram of the scores.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the histogram to an image file (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with every score.")] = False,
) -> None:
    """Score image files with rewards; raw scores in the unit of each reward.

    Images that cannot be read, or that a reward cannot score, are named and left out, and the exit code is 1.
    """
    from statistics import fmean

    from acpo_dist.data.images import count_images, expand_globs
    from acpo_dist.rewards.naming import metric_section
    from acpo_dist.tracking.console import Console
    from acpo_dist.tracking.histogram import save_histogram, text_histogram
    from acpo_dist.workers.reward.worker import RewardWorker

    if plot is not None and plot.suffix.lower() not in _PLOTS:
        raise UsageError(f"--plot {plot}: expected a file ending in {', '.join(_PLOTS)}.")
    console = Console()
    images = expand_globs(images)
    total = count_images(images, column=column)
    for path in (csv, plot):
        if path is not None:
            _require_writable(path)
    given = {"weights": weights} if weights else {}
    workers = [
        RewardWorker(metric_section(name, "--reward", **given), model=None, cut="image", wire_dtype="float32")
        for name in reward or ["two_stream", "strided_judge"]
    ]
    names = [worker.name for worker in workers]
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    with console.phase("score", min(total, limit or total)) as advance:
        for batch in _batches(images, column, limit, batch_size, skipped):
            columns = [_scores(worker, batch, prompt, skipped) for worker in workers]
            for row, (name, _) in enumerate(batch):
                rows.append({"path": name, **{n: values[row] for n, values in zip(names, columns, strict=True)}})
            advance(len(batch))
    for text in skipped:
        say(f"left out: {text}")
    if csv is not None:
        _write_csv(csv, ["path", *names], rows)
    found = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    means = {name: fmean(values) for name, values in found.items() if values}
    found = {name: values for name, values in found.items() if values}
    if plot is not None and found:
        save_histogram(found, plot)
    if as_json:
        answer({"images": len(rows), "mean": means, "scores": rows, "skipped": skipped})
    elif rows:
        table = [[row["path"], *(_shown(row[name]) for name in names)] for row in rows]
        mean = ["mean", *(_shown(means.get(name)) for name in names)]
        console.table(f"{len(rows)} images", ["path", *names], [*table, mean])
    if histogram and not as_json:
        for name, values in found.items():
            console.message("\n".join([f"{name}, {len(values)} images", *text_histogram(values)]))
    if skipped:
        raise typer.Exit(1)


def _scores(worker: Any, batch: list[tuple[str, Any]], prompt: str, skipped: list[str]) -> list[float | None]:
    """Return one reward's scores of a batch; None for an image that it cannot score, which is recorded."""
    import torch

    from acpo_dist.core.errors import AcpoError, WorkerError

    try:
        return worker.score(torch.stack([image for _, image in batch]), [prompt] * len(batch))
    except WorkerError:
        raise
    except Exception as error:  # a reward may be user code; its exception concerns this image only
        if len(batch) == 1:
            said = str(error)
            if not isinstance(error, AcpoError):
                said = f"{worker.name}: {type(error).__name__}: {said.strip().partition(chr(10))[0]}"
            skipped.append(f"{batch[0][0]}: {said}")
            return [None]
        # Retry one by one, so that only the faulty image loses its score.
        return [score for one in batch for score in _scores(worker, [one], prompt, skipped)]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _batches(
    paths: list[Path], column: str, limit: int | None, size: int, skipped: list[str]
) -> Iterator[list[tuple[str, Any]]]:
    """Yield consecutive images of one size, at most `size`, fewer of large ones; undecodable ones are recorded."""
    from itertools import islice

    from acpo_dist.data.decoding import at_once
    from acpo_dist.data.images import read_images

    batch: list[tuple[str, Any]] = []
    for name, image in islice(read_images(paths, column=column, skip=skipped.append), limit):
        if batch and (len(batch) == at_once(batch[0][1], size) or batch[0][1].shape != image.shape):
            yield batch
            batch = []
        batch.append((name, image))
    if batch:
        yield batch


def _require_writable(path: Path) -> None:
    """Check that a file can be written before hours of scoring; existing content is kept."""
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error


def _write_csv(path: Path, header: list[str], rows: list[dict[str, Any]]) -> None:
    import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
