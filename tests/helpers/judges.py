"""User-defined judges, as `module:Class`, one of which cannot score some images."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from acpo_dist.config.plugins import MetricConfig


class FailsOnGreen:
    """Mean brightness; raises if green is the strongest channel, as user code may."""

    Config: ClassVar[type[MetricConfig]] = MetricConfig

    def __init__(self, config: MetricConfig, *, device: str = "cpu") -> None:
        self._name = config.name

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        means = images.mean((2, 3))
        green = means.argmax(1) == 1
        if green.any():
            raise ValueError(f"{int(green.sum())} images are green")
        return means.mean(1)


class PromptLength(FailsOnGreen):
    """Length of the prompt."""

    class Config(MetricConfig):
        needs_prompts: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])
