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
    """One line of the listing."""

    name: str
    """As `acpo score --reward` takes it."""
    type: str
    """As a configuration names it."""
    needs_download: bool
    """Weights come from elsewhere on first use, unless a local file or folder is given."""
    differentiable: bool
    """May drive an algorithm that needs the reward's gradient."""
    needs_prompts: bool
    range: str
    """Lowest and highest raw score; `~` means about."""
    direction: str
    """`higher` or `lower` is better."""
    minimum_size: int
    """Smallest height and width of an image, in pixels."""
    licence: str
    note: str


def reward_listing() -> list[dict[str, Any]]:
    """All metrics, ours first, then pyiqa's; the keys are the fields of `RewardRow`.

    Range and direction of pyiqa's metrics are pyiqa's own where it is installed.
    """
    ours = [_row(name, _section(name)) for name in REWARDS if name != "pyiqa"]
    theirs = [_row(f"pyiqa:{name}", PyiqaConfig(metric=name)) for name in PYIQA]
    return [asdict(row) for row in (*ours, *theirs)]


def _section(name: str) -> MetricConfig:
    # No fact depends on the keys a user must set, so they need not be set here.
    return section_class("reward", REWARDS, MetricConfig, name).model_construct(type=name)


def _row(name: str, section: MetricConfig) -> RewardRow:
    return RewardRow(
        name=name,
        type=section.type,
        needs_download=section.needs_download,
        differentiable=section.differentiable,
        needs_prompts=section.needs_prompts,
        range=section.score_range,
        direction="higher" if section.direction > 0 else "lower",
        minimum_size=section.minimum_size,
        licence=section.licence,
        note=section.note,
    )
