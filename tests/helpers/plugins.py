"""The smallest plug-ins that the configuration accepts, so that its tests need no real reward, model or algorithm."""

from typing import ClassVar

from pydantic import Field

from acpo_dist.algorithms.base import AlgorithmConfig
from acpo_dist.config.section import Section


class Smooth:
    """A reward with a usable gradient."""

    class Config(Section):
        type: str
        name: str = "smooth"
        weight: float = Field(default=1.0, gt=0)

    @staticmethod
    def unusable(config: Config) -> str | None:
        return None

    @staticmethod
    def differentiable(config: Config) -> bool:
        return True


class ScoresOnly(Smooth):
    """A reward without a gradient."""

    @staticmethod
    def differentiable(config: Smooth.Config) -> bool:
        return False


class Broken(Smooth):
    """A reward that cannot be used here."""

    @staticmethod
    def unusable(config: Smooth.Config) -> str | None:
        return f"needs the package `absent` for `{config.name}`"


class WithoutConfig:
    """Not a plug-in at all."""


class Captioned:
    """A model family that draws from prompts."""

    conditional = True

    class Config(Section):
        class Adapter(Section):
            rank: int = Field(default=8, ge=1)

        type: str
        path: str = "somewhere"
        adapter: Adapter = Adapter()


class Unprompted:
    """A model family that does not."""

    conditional = False

    class Config(Section):
        type: str
        channels: int = 8


class NeedsGradients:
    """An algorithm that needs the reward's gradient."""

    class Config(AlgorithmConfig):
        pathwise: ClassVar[bool] = True
        type: str
        anchor_weight: float = 0.1


class NeedsScores:
    """An algorithm that needs scores only."""

    class Config(AlgorithmConfig):
        type: str
