"""From a group's scores to advantages, with every filter counted."""

from collections.abc import Mapping
from dataclasses import asdict

from pydantic import Field

from acpo_dist.config.section import Section
from acpo_dist.core.types import ScoredGroups, Selection
from acpo_dist.objective.advantage import AdvantageCounts, Advantages, constant_images, group_advantages


class AdvantageConfig(Section):
    """How a sample is compared with the others of its prompt."""

    limit: float = Field(default=5.0, gt=0)
    """Advantages are clipped to this many standard deviations of the group."""
    min_std: float = Field(default=1e-3, ge=0)
    """Groups whose reward spreads less are dropped; in standard deviations of base samples."""
    veto: bool = True
    """Drop samples that one reward puts above their group's mean and another below it."""
    min_vote: float = Field(default=0.0, ge=0)
    """A reward has a say on samples that it puts at least so many of its group standard deviations off the mean."""
    drop_constant: bool = True
    """Drop images of one flat colour."""


def flat_images(scored: ScoredGroups) -> frozenset[str]:
    """Ids of images without content."""
    images = scored.images()
    return frozenset(name for name, image in images.items() if bool(constant_images(image.unsqueeze(0))))


def advantages_of(scored: ScoredGroups, config: AdvantageConfig) -> Advantages:
    """Advantages relative to each prompt's group."""
    return group_advantages(
        [[plan.sample_id for plan in group.samples] for group in scored.groups],
        scored.qualities, scored.weights, spread=scored.spread, limit=config.limit, min_std=config.min_std,
        min_vote=config.min_vote, veto=config.veto, constant=flat_images(scored) if config.drop_constant else (),
    )  # fmt: skip


def grouped_selection(scored: ScoredGroups, weights: Mapping[str, float], counts: AdvantageCounts) -> Selection:
    """All samples in their order; those that were dropped keep their place with weight 0."""
    ids = tuple(plan.sample_id for group in scored.groups for plan in group.samples)
    metrics = {f"select/{name}": float(value) for name, value in asdict(counts).items()}
    return Selection(sample_ids=ids, weights={name: weights.get(name, 0.0) for name in ids}, metrics=metrics)
