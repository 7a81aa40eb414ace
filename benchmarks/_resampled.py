"""A pyiqa metric on enlarged or mirrored images, a plug-in of `brisque_reward.py`: the model draws 32 pixels."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from acpo_dist.rewards.config import PyiqaConfig
from acpo_dist.rewards.pyiqa_metric import PyiqaMetric


class Resampled:
    """A pyiqa metric that scores the bicubic enlargement of an image, or three by three reflections of that."""

    class Config(PyiqaConfig):
        """Keys of pyiqa's metric, and how images are changed before it."""

        type: str = "_resampled:Resampled"
        minimum_size: ClassVar[int] = 32
        enlarge: int = Field(default=2, ge=1)
        """Factor of the bicubic enlargement."""
        mirror: bool = False
        """Add reflections at all sides, for metrics that need three times as many pixels; none is interpolated."""

    def __init__(self, config: "Resampled.Config", *, device: str = "cpu") -> None:
        """Build the metric."""
        self._config, self._metric = config, PyiqaMetric(config, device=device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images of shape (B, 3, H, W), values in [0, 1]; returns (B,)."""
        if self._config.enlarge > 1:
            scale = float(self._config.enlarge)
            images = nn.functional.interpolate(images, scale_factor=scale, mode="bicubic").clamp(0, 1)
        for axis in (-1, -2) if self._config.mirror else ():
            images = torch.cat([images.flip(axis), images, images.flip(axis)], axis)
        return self._metric(images, prompts)
