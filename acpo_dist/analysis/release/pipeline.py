"""A plain diffusers pipeline of what a run exported, following a trajectory of ours."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from acpo_dist.config.schema import Config
from acpo_dist.core.errors import UsageError
from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.models.loading import load_part, resolve_path
from acpo_dist.models.schedulers import pipeline_arguments
from acpo_dist.training.run_folder import RESOLVED, read_run_config
from acpo_dist.training.trajectory.artefact import read_schedule

_SCHEDULERS = {"euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
_MULTIPLE = 8
"""What diffusers' pipelines want of a size, whatever the VAE."""


def run_config(model: str) -> Config | None:
    """Configuration of a run folder, or None for anything else.

    Raises:
        ConfigError: the run's configuration cannot be read.
    """
    return read_run_config(Path(model)) if (Path(model) / RESOLVED).is_file() else None


def exported_lora(model: str) -> Path:
    """Folder of the LoRA that a run exported.

    Raises:
        UsageError: no run, or one that has exported no LoRA.
    """
    path = Path(model)
    if not (path / RESOLVED).is_file():
        raise UsageError(f"{model} is no run, so which LoRA is meant must be said: --lora FILE.")
    lora = path / "export" / "lora"
    if not lora.is_dir():
        raise UsageError(
            f"{model} has exported no LoRA: it has not ended, or it tuned every weight, and then there is nothing "
            "between base and tuned."
        )
    return lora


def open_base(config: Config, solver: str) -> tuple[Any, bool]:
    """What a run tuned, as `open_pipeline` gives it; revision, variant, VAE and parts are the run's.

    Raises:
        UsageError: unknown solver, or a model that takes no LoRA.
        ModelError: the base model is not to be had, or not whole.
    """
    _require_solver(solver)
    family = resolve("model", MODELS, config.model.type)
    if not hasattr(family, "open_pipeline"):
        raise UsageError(f"the run tuned a `{config.model.type}` model, whose pipeline takes no LoRA.")
    return _ready(family.open_pipeline(config.model), solver)


def open_pipeline(model: str, solver: str) -> tuple[Any, bool]:
    """The pipeline, with a scheduler that can follow a trajectory.

    Args:
        model: a run (its `export` is meant), a pipeline folder, a hub id, or an embedded toy.
        solver: `euler` or `dpmpp_2m`.

    Returns:
        (pipeline, whether it draws from prompts).

    Raises:
        UsageError: unknown solver, or a run that has exported nothing yet.
        ModelError: the folder cannot be opened.
    """
    _require_solver(solver)
    path = Path(model)
    if (path / RESOLVED).is_file():
        if not (path / "export" / "model_index.json").is_file():
            raise UsageError(f"{model} is a run that has exported nothing yet: it does so when it ends.")
        model = str(path / "export")
    pipeline = load_part(DiffusionPipeline.from_pretrained, resolve_path(model), None, dtype=torch.float32)
    return _ready(pipeline, solver)


def _require_solver(solver: str) -> None:
    if solver not in _SCHEDULERS:
        raise UsageError(f"unknown --solver {solver}; known: {', '.join(_SCHEDULERS)}")


def _ready(pipeline: Any, solver: str) -> tuple[Any, bool]:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    conditional = not isinstance(pipeline, DDPMPipeline)
    if conditional:
        pipeline.scheduler = _SCHEDULERS[solver].from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return pipeline, conditional


def size_arguments(pipeline: Any, size: int | None) -> dict[str, Any]:
    """Height and width for the pipeline's call; nothing for its own size.

    Raises:
        UsageError: no pipeline on latents, or a size that it cannot draw.
    """
    if size is None:
        return {}
    if isinstance(pipeline, DDPMPipeline):
        raise UsageError("--size: a DDPMPipeline draws images of one size; leave the option out")
    step = math.lcm(_MULTIPLE, pipeline.vae_scale_factor)
    if size < step or size % step:
        raise UsageError(
            f"height and width must be a multiple of {step}, found {size} (--size, or else the run's model.image_size)"
        )
    return {"height": size, "width": size}


def arguments_for(pipeline: Any, schedule: Path | None, steps: int) -> dict[str, Any]:
    """How many steps, or which levels, for the pipeline's call.

    Raises:
        UsageError: a schedule for an unconditional pipeline, which takes none.
        ConfigError: a schedule that the scheduler cannot follow.
        VrgError: a schedule that cannot be read, or was made for other noise levels.
    """
    if schedule is None:
        return {"num_inference_steps": steps}
    if isinstance(pipeline, DDPMPipeline):
        raise UsageError("a DDPMPipeline takes no trajectory; `acpo train` and `acpo vrg` walk it with our own sampler")
    trajectory = read_schedule(schedule, pipeline.scheduler.alphas_cumprod.double().numpy())
    # With this spacing diffusers starts Euler from unit noise in x, as the trajectory means it.
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing="leading")
    return pipeline_arguments(pipeline.scheduler, trajectory)


def images_of(output: Any) -> Tensor:
    """Images of a pipeline's numpy output as uint8 (B, 3, H, W)."""
    array = np.asarray(output.images)
    return torch.from_numpy((array * 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
