"""What a metric must offer to reward or to judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import Field
from torch import Tensor

from acpo_dist.config.section import Section


class MetricConfig(Section):
    """Keys that every reward and judge has."""

    type: str
    name: str = ""
    """Name in tracking and of the deployment; empty takes the type."""
    weight: float = Field(default=1.0, gt=0)
    """Weight among the rewards of a run; scores are normalised first, so 1 means the same for every metric."""
    hinge: float | Path | None = None
    """No reward, and no gradient, beyond this: a normalised score, or real images (file, folder or parquet file with
    the column `data.image_column`) whose mean it is, found once before training. For `rewards.train` alone."""

    def model_post_init(self, context: Any, /) -> None:
        """Fill the name, so that it can be relied on."""
        if not self.name:
            # The section is frozen for its users; this is still its construction.
            object.__setattr__(self, "name", self.default_name())

    def default_name(self) -> str:
        """Name that is used when none is given."""
        return self.type


class SmoothQuality:
    """What most learned metrics share: differentiable almost everywhere, and higher is better."""

    @classmethod
    def differentiable(cls, config: MetricConfig) -> bool:
        """See `Metric.differentiable`."""
        return True

    @classmethod
    def direction(cls, config: MetricConfig) -> int:
        """See `Metric.direction`."""
        return 1


class Metric(Protocol):
    """A loaded metric."""

    Config: ClassVar[type[MetricConfig]]
    needs_prompts: bool

    @classmethod
    def unusable(cls, config: MetricConfig) -> str | None:
        """Why the metric cannot be built on this machine, or None. Cheap: nothing heavy is imported."""
        ...

    @classmethod
    def differentiable(cls, config: MetricConfig) -> bool:
        """Whether the score has a usable gradient with respect to the image."""
        ...

    @classmethod
    def direction(cls, config: MetricConfig) -> int:
        """+1 if a higher raw score is better, -1 if a lower one is."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images.

        Args:
            images: float32 RGB in [0, 1], shape (B, 3, H, W).
            prompts: one per image.

        Returns:
            Raw scores (B,), float32, in the metric's own unit; each depends on its own image alone.
        """
        ...
