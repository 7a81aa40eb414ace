"""List of all metrics with their properties, as printed by `acpo rewards list`."""

from dataclasses import asdict, dataclass
from typing import Any

from acpo_dist.config.plugins import MetricConfig
from acpo_dist.config.section import section_class
from acpo_dist.core.registry import REWARDS
from acpo_dist.rewards.config import PyiqaConfig
from acpo_dist.rewards.pyiqa_table import PYIQA


@dataclass(frozen=True, kw_only=True)
class RewardRow:
    """One row of the listing."""

    name: str
    """Name for `acpo score --reward`."""
    type: str
    """Name in a configuration."""
    needs_download: bool
    """Whether weights are downloaded on first use, unless a local file or folder is given."""
    differentiable: bool
    """Whether algorithms that need the reward's gradient can use it."""
    gradient_step: float | None
    """Largest measured signed gradient step, in 1/255, that improved nine of ten real images; None if not measured."""
    needs_prompts: bool
    space: str
    """What is scored: `image`, or `latent` during a run only."""
    range: str
    """Lowest and highest raw score; `~` means about."""
    direction: str
    """Direction of better scores: `higher` or `lower`."""
    minimum_size: int
    """Smallest height and width of an image, in pixels."""
    licence: str
    note: str


def reward_listing() -> list[dict[str, Any]]:
    """Return all metrics, built-in ones first, then pyiqa's; the keys are the fields of `RewardRow`.

    Range and direction of pyiqa's metrics come from pyiqa if it is installed.
    """
    ours = [_row(name, _section(name)) for name in REWARDS if name != "pyiqa"]
    theirs = [_row(f"pyiqa:{name}", PyiqaConfig(metric=name)) for name in PYIQA]
    return [asdict(row) for row in (*ours, *theirs)]


def _section(name: str) -> MetricConfig:
    # No fact depends on the keys that a user must set, so they need not be set here.
    return section_class("reward", REWARDS, MetricConfig, name).model_construct(type=name)


def _row(name: str, section: MetricConfig) -> RewardRow:
    return RewardRow(
        name=name,
        type=section.type,
        needs_download=section.needs_download,
        differentiable=section.differentiable,
        gradient_step=section.gradient_step,
        needs_prompts=section.needs_prompts,
        space=section.space,
        range=section.score_range,
        direction="higher" if section.direction > 0 else "lower",
        minimum_size=section.minimum_size,
        licence=section.licence,
        note=section.note,
    )
