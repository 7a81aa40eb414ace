"""A reward plug-in with one of several mistakes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from acpo_dist.config.plugins import MetricConfig


class FaultyReward:
    """Mean brightness, returned or computed wrongly."""

    class Config(MetricConfig):
        type: str = f"{__name__}:FaultyReward"
        fault: str = "none"

    def __init__(self, config: Any, *, device: str = "cpu") -> None:
        self._fault, self._calls = config.fault, 0
        if config.fault == "init":
            raise KeyError("backbone")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any:
        self._calls += 1
        scores = images.mean((1, 2, 3))
        if self._fault == "third_call" and self._calls >= 3:
            raise KeyError("embedding")
        return {
            "constant": torch.full((len(images),), 0.5),
            "flat": 0.0 * scores + 0.5,
            "detached": scores.detach(),
            "nan": scores * torch.nan,
            "scalar": scores.mean(),
            "column": scores[:, None],
            "list": scores.tolist(),
            "meta": torch.empty(len(images), device="meta"),
            "integers": (255 * scores).long(),
            "none": scores,
            "third_call": scores,
            "float64": scores.double(),
        }[self._fault]
