"""`acpo export`: a checkpoint for other programs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app


@app.command("export")
def export_command(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="comfy or kohya (one LoRA file for all tools), diffusers, merged (folder) or single-file; "
            "default: comfy, or merged after full fine-tuning.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    weights: Annotated[str, typer.Option(help="raw (the last step's) or ema (averaged).")] = "raw",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Write the tuned weights as a LoRA file, a merged pipeline or a checkpoint file, with a model card."""
    from acpo_dist.analysis.release.export import export
    from acpo_dist.tracking.console import Console

    asked: Any = layout
    done = export(source, out, layout=asked, weights=weights, dtype=dtype)
    if as_json:
        answer(
            {
                "folder": str(done.folder), "file": str(done.file), "card": str(done.card),
                "schedule": str(done.schedule) if done.schedule else None,
                "iteration": done.iteration, "sha256": done.checksum, "format": done.layout, "dtype": dtype,
                "weights": weights,
                "guard": done.guard,
            }
        )  # fmt: skip
        return
    console = Console()
    if done.guard is not None:
        console.message(done.guard)
    console.message(
        f"{done.file} ({done.layout}, {dtype}, {weights} weights of iteration {done.iteration}); {done.card}"
    )
