"""A plain diffusers pipeline of what a run exported, following a trajectory of ours."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from acpo_dist.core.errors import UsageError
from acpo_dist.models.loading import load_part, resolve_path
from acpo_dist.models.schedulers import pipeline_arguments
from acpo_dist.models.vae import load_vae
from acpo_dist.retiming.artefact import read_schedule
from acpo_dist.session import RESOLVED, read_run_config

_SCHEDULERS = {"euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}


def base_and_lora(model: str) -> tuple[str, Path, str | None]:
    """What a run tuned and what it made of it: (base model, folder of its LoRA, VAE that replaces the base's or None).

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
    config = read_run_config(path)
    return config.model.path, lora, config.model.vae


def open_pipeline(model: str, solver: str, *, vae: str | None = None) -> tuple[Any, bool]:
    """The pipeline, with a scheduler that can follow a trajectory.

    Args:
        model: a run (its `export` is meant), a pipeline folder, a hub id, or an embedded toy.
        solver: `euler` or `dpmpp_2m`.
        vae: folder or hub id of a VAE that replaces the pipeline's.

    Returns:
        (pipeline, whether it draws from prompts).

    Raises:
        UsageError: unknown solver, or a run that has exported nothing yet.
        ModelError: the folder cannot be opened.
    """
    if solver not in _SCHEDULERS:
        raise UsageError(f"unknown --solver {solver}; known: {', '.join(_SCHEDULERS)}")
    path = Path(model)
    if (path / RESOLVED).is_file():
        if not (path / "export" / "model_index.json").is_file():
            raise UsageError(f"{model} is a run that has exported nothing yet: it does so when it ends.")
        model = str(path / "export")
    pipeline = load_part(DiffusionPipeline.from_pretrained, resolve_path(model), None, torch_dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if vae is not None:
        pipeline.vae = load_vae(model, vae, dtype="float32", device=device, offline=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    conditional = not isinstance(pipeline, DDPMPipeline)
    if conditional:
        pipeline.scheduler = _SCHEDULERS[solver].from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return pipeline, conditional


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


def pictures_of(output: Any) -> Tensor:
    """Pictures of a pipeline's numpy output as uint8 (B, 3, H, W)."""
    array = np.asarray(output.images)
    return torch.from_numpy((array * 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
