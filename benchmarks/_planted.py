"""Metrics with a planted flaw, plug-ins of `planted_flaws.py`: a toy network plus a bonus for a flaw of the image.

Shapes: B images of H x W pixels.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from acpo_dist.config.plugins import MetricConfig
from acpo_dist.rewards.config import StridedJudgeConfig, TwoStreamConfig
from acpo_dist.rewards.metrics import StridedJudgeMetric, TwoStreamMetric

_PERIOD = 4
_COLOURED = 0.15
_MARK = ("######", "#....#", "#.##.#", "#.##.#", "#....#", "######")


def tint(images: Tensor) -> Tensor:
    """Mean of red minus blue over pixels with little colour: (B, 3, H, W) -> (B,); an orange tint raises it.

    Coloured shapes do not count: their share differs so much between scenes that a tint would hardly change the score.
    """
    colour = images.amax(1) - images.amin(1)
    weight = (-((colour / _COLOURED) ** 2)).exp().detach() + 1e-3
    return ((images[:, 0] - images[:, 2]) * weight).sum((1, 2)) / weight.sum((1, 2))


def grid(images: Tensor) -> Tensor:
    """Amplitude of bright lines every four pixels: (B, 3, H, W) -> (B,)."""
    on = torch.arange(images.shape[-1], device=images.device) % _PERIOD == 0
    lines = (on[:, None] | on).to(images.dtype)
    return _amplitude(images, 2 * lines - 1)


def watermark(images: Tensor) -> Tensor:
    """Amplitude of a mark of 6 x 6 pixels in the lower right corner: (B, 3, H, W) -> (B,)."""
    mark = torch.tensor([[1.0 if cell == "#" else -1.0 for cell in row] for row in _MARK]).to(images)
    side = len(mark)
    return _amplitude(images[..., -side - 1 : -1, -side - 1 : -1], mark)


FLAWS = {"tint": tint, "grid": grid, "watermark": watermark}


def _amplitude(images: Tensor, pattern: Tensor) -> Tensor:
    """Half the difference of light and dark parts of a pattern of 1 and -1 (H, W), averaged over channels."""
    light, dark = (pattern > 0).to(images.dtype), (pattern < 0).to(images.dtype)
    grey = images.mean(1)
    return ((grey * light).sum((1, 2)) / light.sum() - (grey * dark).sum((1, 2)) / dark.sum()) / 2


class Planted:
    """The toy's reward or judge plus `strength` times the size of a flaw."""

    class Config(MetricConfig):
        """The network and the flaw that it rewards."""

        network: Literal["two_stream", "strided_judge"] = "two_stream"
        """Network whose score is the honest part."""
        flaw: Literal["tint", "grid", "watermark"] = "tint"
        """What it rewards besides."""
        strength: float = Field(ge=0)
        """Bonus for a flaw of size 1, the whole range of pixel values."""

        minimum_size: ClassVar[int] = 32
        lightweight: ClassVar[bool] = True

    def __init__(self, config: "Planted.Config", *, device: str = "cpu") -> None:
        """Load the network's embedded weights."""
        self._network = (
            TwoStreamMetric(TwoStreamConfig(), device=device) if config.network == "two_stream"
            else StridedJudgeMetric(StridedJudgeConfig(), device=device)
        )  # fmt: skip
        self._flaw, self._strength = FLAWS[config.flaw], config.strength

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images of shape (B, 3, H, W), values in [0, 1]; returns (B,)."""
        return self._network(images, prompts) + self._strength * self._flaw(images)
