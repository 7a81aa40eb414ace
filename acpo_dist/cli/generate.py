"""`acpo generate`: generate images with a tuned model and plain diffusers."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from acpo_dist.cli.app import answer, app


@app.command("generate")
def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="Run, pipeline folder, checkpoint file, hub id or toy. With --lora: the run whose base model is used."
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt; repeat for several.")] = None,
    num: Annotated[int, typer.Option(min=1, help="Images per prompt; their seeds are derived from --seed.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps, unless a schedule sets them.")] = 20,
    schedule: Annotated[Path | None, typer.Option(help="Trajectory: artefact of `acpo vrg`, or a text file.")] = None,
    solver: Annotated[
        str, typer.Option(help="euler (follows levels exactly) or dpmpp_2m (integer timesteps).")
    ] = "euler",
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")] = 5.0,
    guidance_rescale: Annotated[
        float, typer.Option(min=0, max=1, help="Guidance rescale; 0.7 for models with zero terminal SNR.")
    ] = 0.0,
    negative_prompt: Annotated[str | None, typer.Option(help="Negative prompt; default: the run's, or none.")] = None,
    literal_weights: Annotated[
        bool, typer.Option("--literal-weights", help="Encode weights such as (a red car:1.2) as plain text.")
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            help="WIDTHxHEIGHT in pixels, or one number for a square; default: the run's (of several, the one with the "
            "largest share), or the model's own."
        ),
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA of the tuned model, in diffusers' or kohya's layout.")] = None,
    lora_scale: Annotated[
        float | None,
        typer.Option(help="LoRA scale: 0 base model, 1 tuned model; needs --lora or a run that trained a LoRA."),
    ] = None,
    lora_scale_range: Annotated[
        list[str] | None, typer.Option(help="t0:t1:scale, LoRA scale for timesteps t0 to t1; repeat for several.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="LoRA scales to compare side by side, such as 0,0.25,0.5,0.75,1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Root seed.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the images and their grid.")] = Path("images"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Generate images from prompts and seeds, one PNG each, and a grid with one row per prompt and seed."""
    import torch

    from acpo_dist.analysis.release.pipeline import (
        arguments_for,
        exported_lora,
        images_of,
        open_base,
        open_pipeline,
        prompt_arguments,
        run_config,
        size_arguments,
    )
    from acpo_dist.core.errors import UsageError
    from acpo_dist.core.seeding import derive_seed
    from acpo_dist.core.sizes import main_size, parse_size
    from acpo_dist.data.prompts import require_no_weights
    from acpo_dist.models.lora_scale import LoraScale, check_scale, parse_grid, parse_range
    from acpo_dist.tracking.console import Console
    from acpo_dist.tracking.images import save_grid

    wanted = lora_scale is not None or bool(lora_scale_range) or grid is not None
    config = run_config(model)
    if lora is None:
        lora = exported_lora(model)
        if wanted and lora is None:
            raise UsageError(f"{model} has no LoRA of its own, and a scale needs one: name it with --lora FILE.")
    if grid is not None and lora_scale is not None:
        raise UsageError("--grid and --lora-scale exclude each other: --grid draws several scales, --lora-scale one")
    scales = parse_grid(grid) if grid is not None else (1.0 if lora_scale is None else lora_scale,)
    for value in scales:
        check_scale(value, "--lora-scale")
    ranges = [parse_range(text) for text in lora_scale_range or ()]
    if config is not None and lora is not None:
        # A LoRA is loaded into the base model of the run, opened as the run opened it.
        pipeline, conditional = open_base(config, solver)
    else:
        pipeline, conditional = open_pipeline(model, solver)
    if guidance_rescale > 0 and "guidance_rescale" not in inspect.signature(type(pipeline).__call__).parameters:
        raise UsageError(f"--guidance-rescale: {type(pipeline).__name__} has no such option. Omit it.")
    if conditional and not prompt:
        raise UsageError("the model takes prompts: set --prompt, once or several times")
    adapter = LoraScale(pipeline, lora) if lora is not None else None
    prompts = prompt or [""]
    try:
        wanted_size = parse_size(size) if size is not None else None
    except ValueError as error:
        raise UsageError(f"--size: {error}") from error
    if config is not None:
        wanted_size = main_size(config.model.sizes) if size is None else wanted_size
        negative_prompt = getattr(config.model, "negative_prompt", None) if negative_prompt is None else negative_prompt
    literal = literal_weights or (config is not None and config.data.prompt_weights == "literal")
    require_no_weights([*prompts, negative_prompt or ""], "literal" if literal else "refuse", "--prompt")
    trajectory_args = arguments_for(pipeline, schedule, steps) | size_arguments(pipeline, wanted_size)
    console, rows, images, labels = Console(), [], [], []
    out.mkdir(parents=True, exist_ok=True)
    with console.phase("generate", len(prompts) * num * len(scales)) as advance:
        for index, text in enumerate(prompts):
            for sample in range(num):
                own = derive_seed("generate", seed, text, sample)
                asked: dict[str, Any] = {"guidance_scale": guidance_scale} if conditional else {}
                if guidance_rescale > 0:
                    asked["guidance_rescale"] = guidance_rescale
                if conditional:
                    asked |= prompt_arguments(pipeline, config, text, negative_prompt, guidance_scale)
                for place, scale in enumerate(scales):
                    if adapter is not None:
                        adapter.set(scale, ranges)
                    generator = torch.Generator().manual_seed(own)
                    image = images_of(pipeline(**asked, **trajectory_args, generator=generator, output_type="np"))
                    suffix = f"-{place:02d}" if len(scales) > 1 else ""
                    path = out / f"{index:03d}-{sample:03d}{suffix}.png"
                    save_grid(image, path, columns=1, scale=1)
                    row = {"path": str(path), "prompt": text, "seed": own}
                    rows.append(row | ({"lora_scale": scale} if adapter is not None else {}))
                    images.append(image)
                    advance(1)
                labels.append(text or "-")
    sheet = out / "grid.png"
    several = len(scales) > 1
    save_grid(
        torch.cat(images), sheet, columns=len(scales) if several else num,
        labels=labels if several else labels[::num],
        title="LoRA scale " + ", ".join(f"{value:g}" for value in scales) if several else None,
    )  # fmt: skip
    if as_json:
        answer({"images": rows, "grid": str(sheet)})
        return
    console.message(f"{len(rows)} images in {out}; {sheet}")
