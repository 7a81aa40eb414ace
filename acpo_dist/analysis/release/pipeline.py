"""Open the exported model of a run as a plain diffusers pipeline, with a scheduler that can follow a trajectory."""

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import UsageError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.sizes import Size, size_text
from acpo_dist.diffusion.flow import flow_alpha_bars
from acpo_dist.models.flow_levels import is_flow
from acpo_dist.models.loading import load_part, resolve_path
from acpo_dist.models.schedulers import UNSHIFTED, UnetFlowScheduler, pipeline_arguments
from acpo_dist.models.sd3 import T5_PARTS
from acpo_dist.models.text import Encoder
from acpo_dist.models.transformer import TransformerFamily
from acpo_dist.training.export import read_export_facts
from acpo_dist.training.open_model import source_config
from acpo_dist.training.run_folder import RESOLVED, read_run_config
from acpo_dist.training.trajectory.artefact import read_schedule

_SCHEDULERS = {"euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
_FAMILIES = {
    "StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15", "StableDiffusion3Pipeline": "sd3",
    "ZImagePipeline": "zimage", "Flux2KleinPipeline": "flux2_klein",
}  # fmt: skip
_MULTIPLE = 8
"""Image sizes of diffusers' pipelines are multiples of this, whatever the VAE."""


def run_config(model: str) -> Config | None:
    """Return the configuration of a run folder, or None if `model` is no run.

    Raises:
        ConfigError: the run's configuration cannot be read.
    """
    return read_run_config(Path(model)) if (Path(model) / RESOLVED).is_file() else None


def exported_lora(model: str) -> Path | None:
    """Return the LoRA file that a run exported; None for a run that exported a pipeline, and if `model` is no run.

    Raises:
        UsageError: the run has no export yet.
    """
    path = Path(model)
    if not (path / RESOLVED).is_file():
        return None
    facts = read_export_facts(path / "export")
    if facts is None:
        raise UsageError(f"{model} is a run without an export: a run exports its model when it ends.")
    file = path / "export" / facts["file"]
    return file if file.suffix == ".safetensors" else None


def open_base(config: Config, solver: str) -> tuple[Any, bool]:
    """Open the base model of a run as in `open_pipeline`, with the run's revision, variant, VAE and replaced parts.

    Raises:
        UsageError: unknown solver, or the model takes no LoRA.
        ModelError: the base model is missing or incomplete.
    """
    _require_solver(solver)
    family = resolve("model", MODELS, config.model.type)
    if not hasattr(family, "open_pipeline"):
        raise UsageError(f"the run tuned a `{config.model.type}` model, whose pipeline takes no LoRA.")
    return _ready(family.open_pipeline(config.model), solver)


def open_pipeline(model: str, solver: str) -> tuple[Any, bool]:
    """Open a pipeline, with a scheduler that can follow a trajectory.

    Args:
        model: a run that exported a pipeline, a pipeline folder, a checkpoint file, a hub id, or an embedded toy.
        solver: `euler` or `dpmpp_2m`.

    Returns:
        (pipeline, whether it takes prompts).

    Raises:
        UsageError: unknown solver.
        ModelError: the folder cannot be opened.
    """
    _require_solver(solver)
    path = Path(model)
    if (path / RESOLVED).is_file():
        model = str(path / "export")
    elif path.is_file():
        return open_base(source_config(model, [])[0], solver)
    folder = resolve_path(model)
    index: Any = load_part(DiffusionPipeline.load_config, folder, None)
    # diffusers loads a folder of Stable Diffusion 3 without T5 only if the missing components are named.
    without = T5_PARTS if index.get("_class_name") == StableDiffusion3Pipeline.__name__ else ()
    missing: dict[str, Any] = {part: None for part in without if part not in index}
    pipeline = load_part(DiffusionPipeline.from_pretrained, folder, None, dtype=torch.float32, **missing)
    return _ready(pipeline, solver)


def _require_solver(solver: str) -> None:
    if solver not in _SCHEDULERS:
        raise UsageError(f"unknown --solver {solver}; known: {', '.join(_SCHEDULERS)}")


def _ready(pipeline: Any, solver: str) -> tuple[Any, bool]:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    conditional = not isinstance(pipeline, DDPMPipeline)
    kind, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    if conditional and is_flow(kind, config):
        if solver != "euler":
            raise UsageError(
                f"--solver {solver}: the model is a flow model, whose pipeline takes Euler steps. Use --solver euler."
            )
        if hasattr(pipeline, "unet"):
            pipeline.scheduler = UnetFlowScheduler.from_config(
                config, shift=config.get("flow_shift", config.get("shift", 1.0))
            )
    elif conditional:
        pipeline.scheduler = _SCHEDULERS[solver].from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return pipeline, conditional


def size_arguments(pipeline: Any, size: Size | None) -> dict[str, Any]:
    """Return width and height for the pipeline's call; nothing for the pipeline's own size.

    Raises:
        UsageError: a pixel-space pipeline, or a size that the pipeline does not support.
    """
    if size is None:
        return {}
    if isinstance(pipeline, DDPMPipeline):
        raise UsageError("--size: a DDPMPipeline has a fixed image size; omit the option")
    step = math.lcm(_MULTIPLE, pipeline.vae_scale_factor)
    if any(side < step or side % step for side in size):
        raise UsageError(
            f"width and height must be multiples of {step}, found {size_text(size)} (--size, or the run's "
            "model.image_size)"
        )
    return {"height": size[1], "width": size[0]}


def prompt_arguments(
    pipeline: Any, config: Config | None, prompt: str, negative: str | None, guidance_scale: float = 1.0
) -> dict[str, Any]:
    """Prompt and negative prompt for the pipeline's call, as the run encodes them.

    A prompt of several chunks, or with `model.clip_skip`, is passed as embeddings: pipelines cut it.

    Args:
        pipeline: a pipeline that takes prompts.
        config: the run's configuration; None for any other model.
        prompt: the prompt.
        negative: the negative prompt, or None.
        guidance_scale: of the run; the pipelines of some flow models count it otherwise.
    """
    plain = {"prompt": prompt} | ({} if negative is None else {"negative_prompt": negative})
    kind = next((kind for name, kind in _FAMILIES.items() if type(pipeline).__name__ == name), None)
    family = resolve("model", MODELS, kind) if kind else None
    if family is None:
        return plain
    model = config.model if config is not None else family.Config(path=pipeline.name_or_path)
    if issubclass(family, TransformerFamily):
        if "negative_prompt" in plain and "negative_prompt" not in inspect.signature(pipeline.__call__).parameters:
            raise UsageError(f"--negative-prompt: {type(pipeline).__name__} takes none. Omit the option.")
        return plain | family.call_arguments(model, guidance_scale)
    encoders = [Encoder(getattr(pipeline, tokens), getattr(pipeline, name)) for tokens, name, _ in family.text_parts]
    cut = model.long_prompts == "cut"
    several = any(len(encoder.chunks(text, cut=cut)) > 1 for encoder in encoders for text in (prompt, negative or ""))
    if not several and getattr(model, "clip_skip", None) is None:
        return plain
    tensors = family.guided_condition(model, encoders, prompt, negative).tensors
    found = {"negative_prompt_embeds": tensors["prompt_embeds"][:1], "prompt_embeds": tensors["prompt_embeds"][1:]}
    if "pooled_prompt_embeds" in tensors:
        pooled = tensors["pooled_prompt_embeds"]
        found |= {"negative_pooled_prompt_embeds": pooled[:1], "pooled_prompt_embeds": pooled[1:]}
    return found


def arguments_for(pipeline: Any, schedule: Path | None, steps: int) -> dict[str, Any]:
    """Return the number of steps, or the levels, for the pipeline's call.

    Raises:
        UsageError: a schedule for an unconditional pipeline.
        ConfigError: the scheduler cannot follow the schedule.
        VrgError: the schedule cannot be read, or was made for other noise levels.
    """
    if schedule is None:
        return {"num_inference_steps": steps}
    if isinstance(pipeline, DDPMPipeline):
        raise UsageError(
            "a DDPMPipeline takes no trajectory; use `acpo train` or `acpo vrg`, which have their own sampler"
        )
    if isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        config = pipeline.scheduler.config
        trajectory = read_schedule(schedule, flow_alpha_bars(config["num_train_timesteps"]).numpy())
        # Otherwise the scheduler would shift the trajectory's sigmas a second time.
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, **UNSHIFTED)
        return pipeline_arguments(pipeline.scheduler, trajectory)
    trajectory = read_schedule(schedule, pipeline.scheduler.alphas_cumprod.double().numpy())
    # With this spacing diffusers starts Euler from unit noise in x, which the trajectory assumes.
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing="leading")
    return pipeline_arguments(pipeline.scheduler, trajectory)


def images_of(output: Any) -> Tensor:
    """Convert a pipeline's numpy output to uint8 images (B, 3, H, W)."""
    array = np.asarray(output.images)
    return torch.from_numpy((array * 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
