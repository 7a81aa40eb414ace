"""`acpo generate`: pictures from a tuned model, through plain diffusers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app


@app.command("generate")
def generate(
    model: Annotated[str, typer.Argument(help="Run, pipeline folder, hub id, or toy-sdxl.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt; repeat for several.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Pictures per prompt; their seeds follow from --seed.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Denoise steps, where no schedule says it.")] = 20,
    schedule: Annotated[Path | None, typer.Option(help="Trajectory: artefact of `acpo vrg`, or a text file.")] = None,
    solver: Annotated[
        str, typer.Option(help="euler (follows levels exactly) or dpmpp_2m (integer timesteps).")
    ] = "euler",
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Root of the seeds.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their grid.")] = Path("pictures"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Draw pictures from prompts and seeds, one PNG each, and a grid with a row per prompt."""
    import torch

    from acpo_dist.core.errors import UsageError
    from acpo_dist.core.seeding import derive_seed
    from acpo_dist.pipeline import arguments_for, open_pipeline, pictures_of
    from acpo_dist.tracking.console import Console
    from acpo_dist.tracking.pictures import save_grid

    pipeline, conditional = open_pipeline(model, solver)
    if conditional and not prompt:
        raise UsageError("the model draws from prompts: give --prompt, once or more often")
    prompts = prompt or [""]
    walk = arguments_for(pipeline, schedule, steps)
    console, rows, pictures = Console(), [], []
    out.mkdir(parents=True, exist_ok=True)
    with console.phase("generate", len(prompts) * num) as advance:
        for index, text in enumerate(prompts):
            for sample in range(num):
                own = derive_seed("generate", seed, text, sample)
                asked: dict[str, Any] = {"prompt": text, "guidance_scale": guidance_scale} if conditional else {}
                generator = torch.Generator().manual_seed(own)
                picture = pictures_of(pipeline(**asked, **walk, generator=generator, output_type="np"))
                path = out / f"{index:03d}-{sample:03d}.png"
                save_grid(picture, path, columns=1, scale=1)
                rows.append({"path": str(path), "prompt": text, "seed": own})
                pictures.append(picture)
                advance(1)
    grid = out / "grid.png"
    save_grid(torch.cat(pictures), grid, columns=num, labels=[text or "-" for text in prompts])
    if as_json:
        answer({"pictures": rows, "grid": str(grid)})
        return
    console.message(f"{len(rows)} pictures in {out}; {grid}")
