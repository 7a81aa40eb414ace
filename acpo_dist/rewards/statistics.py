"""Image statistics as metrics: each is one formula, without weights or downloads.

A statistic describes an image and does not rate it. As judges, statistics reveal reward hacking, such as steadily
rising sharpness or colourfulness; as rewards, they are cheap and have a known optimum.

Shapes: B images of H x W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from acpo_dist.config.plugins import MetricConfig
from acpo_dist.rewards.config import (
    ColourEntropyConfig,
    ColourfulnessConfig,
    EdgeDensityConfig,
    SaturationConfig,
    SharpnessConfig,
    SoftColourEntropyConfig,
    SoftEdgeDensityConfig,
)
from acpo_dist.rewards.inputs import check_images
from acpo_dist.rewards.two_stream import gradient_magnitude

LUMINANCE = (0.299, 0.587, 0.114)
BINS = 8
"""Bins per channel of the colour histogram: at most 9 bits."""
EDGE = 0.1
"""Sobel magnitude above which a pixel is an edge; a vertical step from black to white has 0.5, the maximum is 0.56."""
EDGE_WIDTH = 0.02
"""Width of the logistic step of the soft edge density, in the same unit."""


def sharpness(images: Tensor) -> Tensor:
    """Variance of the Laplacian of the luminance over inner pixels: (B, 3, H, W) -> (B,), 0 to 16, smooth.

    Source: the focus measure of Pech-Pacheco et al. (ICPR 2000) with the 5-point Laplacian.
    """
    weights = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device)
    luminance = (images * weights[:, None, None]).sum(1)
    neighbours = luminance[:, :-2, 1:-1] + luminance[:, 2:, 1:-1] + luminance[:, 1:-1, :-2] + luminance[:, 1:-1, 2:]
    return (neighbours - 4 * luminance[:, 1:-1, 1:-1]).flatten(1).var(1, correction=0)


def colourfulness(images: Tensor) -> Tensor:
    """Colourfulness on the published scale of 8-bit images: (B, 3, H, W) -> (B,), 0 (grey) to about 200.

    Source: Hasler and Suesstrunk (2003), eq. 1: spread plus 0.3 times the mean of the opponent colours R - G and
    (R + G) / 2 - B. The square root is smoothed far below one grey level, which only affects its slope at grey.
    """
    red, green, blue = (255 * images).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)
    spread = opponents.var(2, correction=0).sum(1)
    mean = opponents.mean(2).square().sum(1)
    return _root(spread) + 0.3 * _root(mean)


def saturation(images: Tensor) -> Tensor:
    """Mean of HSV's saturation, (max - min) / max per pixel, 0 for black: (B, 3, H, W) -> (B,), 0 to 1.

    The denominator never falls below one grey level, which changes no 8-bit image and bounds the slope near black.
    """
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp(min=1 / 255)).flatten(1).mean(1)


def edge_density(images: Tensor) -> Tensor:
    """Share of pixels whose Sobel magnitude reaches `EDGE`: (B, 3, H, W) -> (B,), 0 to 1. A step: no gradient."""
    return (gradient_magnitude(images) >= EDGE).to(images.dtype).flatten(1).mean(1)


def soft_edge_density(images: Tensor) -> Tensor:
    """Edge density with a logistic step of width `EDGE_WIDTH`: (B, 3, H, W) -> (B,), between 0 and 1, smooth."""
    return torch.sigmoid((gradient_magnitude(images) - EDGE) / EDGE_WIDTH).flatten(1).mean(1)


def colour_entropy(images: Tensor) -> Tensor:
    """Entropy of the joint RGB histogram with `BINS` equal bins per channel: (B, 3, H, W) -> (B,) bits, 0 to 9.

    Counts of pixels: no gradient.
    """
    level = (images.detach() * BINS).long().clamp(0, BINS - 1)
    joint = (level[:, 0] * BINS + level[:, 1]) * BINS + level[:, 2]
    return _entropy(_histogram(joint, torch.ones_like(joint, dtype=images.dtype)))


def soft_colour_entropy(images: Tensor) -> Tensor:
    """Entropy of a soft RGB histogram, in which each pixel is shared by its nearest bins: (B, 3, H, W) -> (B,) bits.

    `BINS` bin centres per channel from 0 to 1; a value between two centres is shared linearly, a colour among the
    eight corners of its cell. Continuous, and differentiable wherever no value lies on a centre.
    """
    position = images.clamp(0, 1) * (BINS - 1)
    lower = position.detach().floor().clamp(max=BINS - 2)
    upper_share = position - lower
    total = images.new_zeros(len(images), BINS**3)
    for corner in range(8):
        joint = torch.zeros_like(lower[:, 0], dtype=torch.int64)
        share = torch.ones_like(upper_share[:, 0])
        for channel in range(3):
            upper = corner >> channel & 1
            joint = joint * BINS + lower[:, channel].long() + upper
            share = share * (upper_share[:, channel] if upper else 1 - upper_share[:, channel])
        total = total + _histogram(joint, share)
    return _entropy(total)


def _histogram(joint: Tensor, share: Tensor) -> Tensor:
    """Sums of `share` per bin and image, as a distribution: two of (B, H, W) -> (B, BINS ** 3)."""
    pixels = joint[0].numel()
    counts = share.new_zeros(len(joint), BINS**3)
    return counts.scatter_add(1, joint.flatten(1), share.flatten(1)) / pixels


def _entropy(share: Tensor) -> Tensor:
    # The small constant keeps the slope of an empty bin finite; it changes the entropy by less than 1e-5 bits.
    return -(share * torch.log2(share + 1e-9)).sum(1).clamp(max=0)


def _root(squares: Tensor) -> Tensor:
    return (squares + 1e-8).sqrt()


class _Statistic:
    """Base class of metrics that are functions of the image only."""

    def __init__(self, config: MetricConfig, *, device: str = "cpu") -> None:
        self._config = config

    @staticmethod
    def _formula(images: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images; the prompts are ignored.

        Args:
            images: float32 RGB in [0, 1], shape (B, 3, H, W).
            prompts: one per image.

        Returns:
            Raw scores (B,), float32.

        Raises:
            RewardError: the images are invalid or too small.
        """
        check_images(images, name=self._config.name, minimum=self._config.minimum_size)
        return self._formula(images)


class Sharpness(_Statistic):
    """`sharpness` as a metric."""

    Config = SharpnessConfig

    _formula = staticmethod(sharpness)


class Colourfulness(_Statistic):
    """`colourfulness` as a metric."""

    Config = ColourfulnessConfig

    _formula = staticmethod(colourfulness)


class Saturation(_Statistic):
    """`saturation` as a metric."""

    Config = SaturationConfig

    _formula = staticmethod(saturation)


class EdgeDensity(_Statistic):
    """`edge_density` as a metric: scores only."""

    Config = EdgeDensityConfig

    _formula = staticmethod(edge_density)


class SoftEdgeDensity(_Statistic):
    """`soft_edge_density` as a metric."""

    Config = SoftEdgeDensityConfig

    _formula = staticmethod(soft_edge_density)


class ColourEntropy(_Statistic):
    """`colour_entropy` as a metric: scores only."""

    Config = ColourEntropyConfig

    _formula = staticmethod(colour_entropy)


class SoftColourEntropy(_Statistic):
    """`soft_colour_entropy` as a metric."""

    Config = SoftColourEntropyConfig

    _formula = staticmethod(soft_colour_entropy)
