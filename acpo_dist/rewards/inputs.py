"""Validation of images and prompts, shared by all metrics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from acpo_dist.core.errors import RewardError

_ROUNDING = 1e-3


def check_images(images: Tensor, *, name: str, minimum: int = 1) -> None:
    """Check that images can be scored.

    Args:
        images: expected to be floating-point RGB in [0, 1], shape (B, 3, H, W), B at least 1.
        name: name of the metric, for the message.
        minimum: smallest height and width that the metric supports.

    Raises:
        RewardError: wrong rank, channels, size, type or range; no image; or non-finite values.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise RewardError(f"`{name}` scores RGB images of shape (B, 3, H, W), found shape {tuple(images.shape)}")
    if len(images) == 0:
        raise RewardError(f"`{name}` received no images (shape {tuple(images.shape)})")
    if not images.is_floating_point():
        raise RewardError(f"`{name}` takes floating-point images in [0, 1], found {images.dtype}; divide by 255 first")
    height, width = images.shape[2:]
    if min(height, width) < minimum:
        raise RewardError(f"`{name}` needs images of at least {minimum} x {minimum}, found {height} x {width}")
    low, high = images.detach().aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = int((~torch.isfinite(images.detach()).flatten(1).all(1)).sum())
        raise RewardError(f"`{name}`: {bad} of {len(images)} images are not finite")
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise RewardError(f"`{name}` takes images in [0, 1], found values from {low:.4g} to {high:.4g}")


def check_prompts(prompts: Sequence[str], count: int, *, name: str) -> None:
    """Check that every image has a non-empty prompt.

    Raises:
        RewardError: not one prompt per image, or an empty prompt.
    """
    if len(prompts) != count:
        raise RewardError(f"`{name}` needs one prompt per image, found {len(prompts)} for {count} images")
    empty = sum(not prompt.strip() for prompt in prompts)
    if empty:
        raise RewardError(
            f"`{name}` reads prompts, but {empty} of {count} are empty. Give each image its prompt "
            "(`data.prompts` of a run, `--prompt` of `acpo score`)."
        )
