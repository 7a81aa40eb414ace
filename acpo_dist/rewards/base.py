"""Interface of metrics, which serve as rewards or judges."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from acpo_dist.config.plugins import MetricConfig


class Metric(Protocol):
    """A loaded metric."""

    Config: ClassVar[type[MetricConfig]]
    """Its section, with its facts: range, direction, gradient, image size, licence."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images.

        Args:
            images: float32 RGB in [0, 1], shape (B, 3, H, W).
            prompts: one per image.

        Returns:
            Raw scores (B,), float32, in the metric's own unit; each depends on its own image alone.
        """
        ...
