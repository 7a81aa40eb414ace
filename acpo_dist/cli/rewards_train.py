"""`acpo rewards train`: train weights of TwoStream and IPCE."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from acpo_dist.cli.app import answer
from acpo_dist.cli.rewards import rewards_app

train_app = typer.Typer(no_args_is_help=True, help="Train a reward's weights.")
rewards_app.add_typer(train_app, name="train")

Seed = Annotated[int, typer.Option(help="Seed of the split, the weights and all random draws.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object with the report.")]


@train_app.callback()
def _group() -> None:
    """Train a reward's weights."""


@train_app.command("two_stream")
def two_stream(
    data: Annotated[
        Path, typer.Argument(help="Folder or parquet file of good images, or a CSV file: path,mos[,reference].")
    ],
    out: Annotated[Path, typer.Option(help="File for the weights, or a folder for it.")] = Path(
        "two_stream.safetensors"
    ),
    column: Annotated[str, typer.Option(help="Image column of a parquet file.")] = "image",
    network: Annotated[str, typer.Option(help="`toy` (44 thousand parameters) or `published` (1.4 million).")] = "toy",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=2, help="Windows per step.")] = 64,
    learning_rate: Annotated[float, typer.Option(min=1e-8, help="Highest one.")] = 3e-3,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of the references held out for the report.")
    ] = 0.2,
    limit: Annotated[int, typer.Option(min=10, help="Largest number of images read.")] = 5_000,
    lower_is_better: Annotated[bool, typer.Option("--lower-is-better", help="The CSV file holds DMOS.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train TwoStream-IQA on good images with graded damage, or on opinion scores; split by reference image.

    Prints rank and linear correlation (SRCC, PLCC) on held-out references. Use the weights as
    `rewards.train: [{type: two_stream, weights: FILE}]`.
    """
    from acpo_dist.core.errors import UsageError
    from acpo_dist.rewards.training.quality import SIZES, QualitySettings, load_training_data, train_two_stream
    from acpo_dist.tracking.console import Console

    if network not in SIZES:
        raise UsageError(f"--network {network}: expected {' or '.join(SIZES)}.")
    console = Console()
    console.message(f"reading images of {data}")
    found = load_training_data(data, column=column, most=limit, lower_is_better=lower_is_better)
    settings = QualitySettings(
        network=network, steps=steps, batch_size=batch_size, learning_rate=learning_rate, held_out=held_out, seed=seed
    )
    file = out if out.suffix == ".safetensors" else out / "two_stream.safetensors"
    with console.phase("two_stream", steps) as advance:
        report = train_two_stream(found, file, settings, progress=advance)
    if as_json:
        answer(asdict(report))
        return
    console.message(
        f"SRCC {report.srcc:.3f}, PLCC {report.plcc:.3f} on {report.held_out_images} images of "
        f"{report.held_out_references} held-out references ({report.references} trained on), {report.seconds:.0f} s\n"
        f"use it: rewards.train=[{{type: two_stream, weights: {report.weights}}}]"
    )


@train_app.command("ipce")
def ipce(
    data: Annotated[
        str,
        typer.Argument(
            help="Parquet file with images and captions, a CSV file (path, captions, and optionally mos), or `toy`."
        ),
    ],
    clip: Annotated[
        str | None, typer.Option(help="Folder or hub id of the initial CLIP; `toy` makes a tiny one instead.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the weights.")] = Path("ipce"),
    column: Annotated[str, typer.Option(help="Image column of a parquet file.")] = "image",
    prompt_column: Annotated[str, typer.Option(help="Column with the captions.")] = "prompt",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps; with `toy`, of each of its two stages.")] = 400,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=1e-8, help="Initial learning rate.")] = 5e-6,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of the captions held out for the report.")
    ] = 0.2,
    limit: Annotated[int, typer.Option(min=10, help="Largest number of images read.")] = 5_000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train IPCE on captioned images: with opinion scores on these, else own captions (5) against other ones (0).

    Prints the share of held-out images that score higher with their own caption than with another one. Use the
    weights as `rewards.train: [{type: ipce, weights: FOLDER}]`.
    """
    from acpo_dist.core.errors import UsageError
    from acpo_dist.tracking.console import Console

    console = Console()
    if data == "toy":
        if clip is not None:
            raise UsageError("`toy` trains a tiny CLIP from scratch: omit --clip.")
        from acpo_dist.rewards.training.tiny_clip import train_tiny_clip

        out.mkdir(parents=True, exist_ok=True)
        with console.phase("ipce", 2 * steps) as advance:
            tiny = train_tiny_clip(
                out, steps=steps, ipce_steps=steps, seed=seed, progress=lambda step, total, loss: advance(1)
            )
        found = {"pairs": tiny.ipce_pairs, **asdict(tiny), "weights": str(out)}
    else:
        if clip is None:
            raise UsageError("set --clip to the initial CLIP: a folder, or a hub id (openai/clip-vit-base-patch32).")
        from acpo_dist.rewards.training.correspondence import CorrespondenceSettings, read_captioned, train_ipce

        console.message(f"reading images and captions of {data}")
        captioned = read_captioned(Path(data), column=column, prompt_column=prompt_column, most=limit)
        settings = CorrespondenceSettings(
            steps=steps, batch_size=batch_size, learning_rate=learning_rate, held_out=held_out, seed=seed
        )
        with console.phase("ipce", steps) as advance:
            found = asdict(train_ipce(captioned, clip, out, settings, progress=advance))
    if as_json:
        answer(found)
        return
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if isinstance(value, float))
    console.message(f"{metrics}\nuse it: rewards.train=[{{type: ipce, weights: {out}}}]")
