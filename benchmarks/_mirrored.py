"""A pyiqa metric on mirrored images, a plug-in of `brisque_reward.py`: NIQE needs 96 pixels, the model draws 64."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from acpo_dist.rewards.config import PyiqaConfig
from acpo_dist.rewards.pyiqa_metric import PyiqaMetric


class Mirrored:
    """A pyiqa metric that scores three by three reflections of an image: no pixel is interpolated."""

    class Config(PyiqaConfig):
        """As pyiqa's."""

        type: str = "_mirrored:Mirrored"
        minimum_size: ClassVar[int] = 32

    def __init__(self, config: "Mirrored.Config", *, device: str = "cpu") -> None:
        """Build the metric."""
        self._metric = PyiqaMetric(config, device=device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images of shape (B, 3, H, W), values in [0, 1]; returns (B,)."""
        for axis in (-1, -2):
            images = torch.cat([images.flip(axis), images, images.flip(axis)], axis)
        return self._metric(images, prompts)
