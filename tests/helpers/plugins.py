"""The smallest plug-ins that the configuration accepts, so that its tests need no real reward, model or algorithm."""

from typing import ClassVar

from pydantic import Field

from acpo_dist.config.plugins import AlgorithmConfig, MetricConfig, ModelConfig
from acpo_dist.config.section import Section


class Smooth:
    """A reward with a usable gradient."""

    class Config(MetricConfig):
        name: str = "smooth"


class ScoresOnly:
    """A reward without a gradient."""

    class Config(Smooth.Config):
        differentiable: ClassVar[bool] = False


class Broken:
    """A reward that cannot be used here."""

    class Config(Smooth.Config):
        def unusable(self) -> str | None:
            return f"needs the package `absent` for `{self.name}`"


class WithoutConfig:
    """Not a plug-in at all."""


class Captioned:
    """A model family that draws from prompts."""

    class Config(ModelConfig):
        class Adapter(Section):
            rank: int = Field(default=8, ge=1)

        path: str = "somewhere"
        adapter: Adapter = Adapter()


class Unprompted:
    """A model family that does not."""

    class Config(ModelConfig):
        conditional: ClassVar[bool] = False
        channels: int = 8


class NeedsGradients:
    """An algorithm that needs the reward's gradient."""

    class Config(AlgorithmConfig):
        pathwise: ClassVar[bool] = True
        anchor_weight: float = 0.1


class NeedsScores:
    """An algorithm that needs scores only."""

    Config = AlgorithmConfig
