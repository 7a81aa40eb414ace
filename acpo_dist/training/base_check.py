"""Check of base rollouts before training: a base model that draws noise or one colour is reported with remedies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from acpo_dist.core.by_size import Mixed, by_size
from acpo_dist.core.errors import DataError, ModelError
from acpo_dist.core.sizes import Size
from acpo_dist.core.types import RolloutHandle
from acpo_dist.data.images import real_images
from acpo_dist.evaluation.metrics.sanity import latent_problems, sanity_problems, sanity_statistics
from acpo_dist.tracking.images import save_grid
from acpo_dist.training.context import RunContext, fixed_groups

_IMAGES = 64
_SHOWN = 16
_LATENTS = 4
FATAL = ("nonfinite", "constant")
"""Problems with which a run does not start."""
_REMEDIES = {
    "nonfinite": "set model.dtype to bfloat16 or float32, and check the weights of the model",
    "range": "check clip_sample or thresholding, prediction type and betas in `scheduler_config.json`",
    "latents": "check prediction type and betas of the scheduler (`scheduler_config.json`) and sampler.guidance_scale",
    "constant": "usually NaN or overflow in float16: set model.dtype to bfloat16 or float32, or use a VAE that is "
    "stable in float16",
    "noise": "check prediction type and betas of the scheduler (`scheduler_config.json`), the VAE's scaling_factor and "
    " sampler.num_steps",
    "saturated": "check clip_sample or thresholding of a pixel model's scheduler, the VAE's scaling_factor, and "
    "sampler.guidance_scale",
    "spread": "check the VAE's scaling_factor and sampler.guidance_scale",
    "contrast": "check the VAE's scaling_factor, sampler.num_steps and the weights of the model",
}


def check_base(context: RunContext, handles: Sequence[RolloutHandle]) -> None:
    """Write a grid of base samples, print its path, and report implausible samples.

    Args:
        handles: rollouts of the untouched base model.

    Raises:
        ModelError: most images have a single colour or a sample is not finite, so there is nothing to train on.
    """
    ids = [name for handle in handles for name in handle.sample_ids][:_IMAGES]
    rollout = context.ports.rollout
    images = rollout.images(handles, ids)
    path = context.folder.samples / "base.png"
    save_grid(images[:_SHOWN], path, columns=min(8, len(ids)))
    context.ports.tracker.log_image("samples/base", 0, path)
    context.console.message(f"samples of the base model: {path}")
    groups = fixed_groups(context.config, context.prompts, _LATENTS, stream="base")
    found = describe_problems(images, rollout.final_latents(groups, rollout.trajectory()), context.config)
    for text in found.values():
        context.console.message(f"warning: base model: {text}")
    if found:
        context.ports.tracker.set_tags({"base_model_problems": ", ".join(found)})
    fatal = [found[name] for name in FATAL if name in found]
    if fatal:
        raise ModelError(f"the base model draws no images: {fatal[0]} ({path}).")


def describe_problems(images: Mixed, clean: Mixed, config: Any) -> dict[str, str]:
    """Describe what is implausible about base samples.

    Args:
        images: uint8 RGB (B, 3, H, W), or B images of several sizes.
        clean: x_0 of some samples, as `RolloutPool.final_latents` returns them.
        config: the run's configuration; with `data.path` the samples are compared with those images.

    Returns:
        Problem -> one sentence with value, limit and remedy; empty for plausible samples. Those in `FATAL` leave
        nothing to train on.
    """
    largest = max((part for _, part in by_size(images)), key=len)
    real = _real_statistics(config.data.path, config.data.image_column, (largest.shape[3], largest.shape[2]))
    pixel_space = config.model.pixel_space
    problems: dict[str, str] = {}
    for _, part in by_size(clean):
        problems |= latent_problems(part, pixel_space=pixel_space)
    # Statistics between images need one size: the most frequent one.
    problems |= sanity_problems(sanity_statistics(largest), real)
    return {name: f"{text}; {_REMEDIES[name]}" for name, text in problems.items()}


def _real_statistics(path: Path | None, column: str, size: Size) -> dict[str, float] | None:
    if path is None:
        return None
    try:
        return sanity_statistics(torch.stack(real_images(path, column=column, size=size, most=_IMAGES)))
    except DataError:
        # Reported where the data is loaded; the samples are then compared with limits for any image.
        return None
