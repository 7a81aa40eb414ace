"""Content statistics of images, computed without a network; reward hacking shifts them while the reward rises.

Legend: N images, H W pixels.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from acpo_dist.core.by_size import Mixed, map_by_size
from acpo_dist.evaluation.metrics.features import as_float

STATISTICS = ("edge_density", "colour_entropy", "dark_share", "saturated_share", "clipped_share", "contrast")
_EDGE = 0.08
"""Gradient magnitude above which a pixel is on an edge: a step of 1 in luminance gives 0.5."""
_DARK = 0.1
_SATURATED = 0.8
_CLIPPED = 1.5 / 255
_LEVELS = 8
"""Number of histogram levels per colour channel."""


def content_statistics(images: Mixed) -> dict[str, Tensor]:
    """Compute the content statistics of each image.

    Args:
        images: RGB (N, 3, H, W), or N images of several sizes, uint8 or float, clipped to [0, 1]; H and W at least 2.

    Returns:
        Statistic name -> float32 (N,) on the CPU, each in [0, 1]:
            edge_density: share of pixels on an edge of the luminance (Sobel).
            colour_entropy: entropy of the 8 x 8 x 8 RGB histogram, divided by its maximum, log 512.
            dark_share: share of pixels with luminance under 0.1.
            saturated_share: share of pixels with HSV saturation over 0.8 and value over 0.2.
            clipped_share: share of pixels with a channel within one grey level (1/255) of 0 or 1.
            contrast: standard deviation of the luminance.

    Raises:
        ValueError: `images` has another shape or type.
    """
    if isinstance(images, Tensor):
        return _statistics(images)
    return {name: map_by_size(images, lambda part, name=name: _statistics(part)[name]) for name in STATISTICS}


def _statistics(images: Tensor) -> dict[str, Tensor]:
    pixels = as_float(images).cpu()
    luminance = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    low, high = pixels.amin(1), pixels.amax(1)
    saturation = (high - low) / high.clamp(min=1e-6)
    clipped = (low <= _CLIPPED) | (high >= 1 - _CLIPPED)
    return {
        "edge_density": _share(_gradient(luminance) > _EDGE),
        "colour_entropy": _colour_entropy(pixels),
        "dark_share": _share(luminance < _DARK),
        "saturated_share": _share((saturation > _SATURATED) & (high > 0.2)),
        "clipped_share": _share(clipped),
        "contrast": luminance.flatten(1).std(1, correction=0),
    }


def _gradient(luminance_NHW: Tensor) -> Tensor:
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    padded = functional.pad(luminance_NHW[:, None], (1, 1, 1, 1), mode="replicate")
    both = functional.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])
    return both.square().sum(1).sqrt()


def _colour_entropy(pixels: Tensor) -> Tensor:
    level = (pixels * _LEVELS).long().clamp(max=_LEVELS - 1)
    cell = ((level[:, 0] * _LEVELS + level[:, 1]) * _LEVELS + level[:, 2]).flatten(1)
    counts = torch.zeros(len(pixels), _LEVELS**3).scatter_add_(1, cell, torch.ones_like(cell, dtype=torch.float32))
    share = counts / cell.shape[1]
    return -torch.special.xlogy(share, share).sum(1) / math.log(_LEVELS**3)


def _share(flags: Tensor) -> Tensor:
    return flags.flatten(1).float().mean(1)
