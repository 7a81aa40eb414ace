"""Advantages from the scores of a group, with counts of filtered samples."""

from collections.abc import Mapping
from dataclasses import asdict

from acpo_dist.algorithms.config import AdvantageConfig
from acpo_dist.core.types import ScoredGroups, Selection
from acpo_dist.objective.advantage import AdvantageCounts, Advantages, constant_images, group_advantages


def flat_images(scored: ScoredGroups) -> frozenset[str]:
    """Return the ids of images of one flat colour."""
    images = scored.images()
    return frozenset(name for name, image in images.items() if bool(constant_images(image.unsqueeze(0))))


def advantages_of(scored: ScoredGroups, config: AdvantageConfig) -> Advantages:
    """Return advantages relative to the group of each prompt."""
    return group_advantages(
        [[plan.sample_id for plan in group.samples] for group in scored.groups],
        scored.qualities, scored.weights, spread=scored.spread, limit=config.limit, min_std=config.min_std,
        min_vote=config.min_vote, veto=config.veto, across_groups=config.std == "global",
        constant=flat_images(scored) if config.drop_constant else (),
    )  # fmt: skip


def unit_selection(scored: ScoredGroups, config: AdvantageConfig) -> Selection:
    """Select all samples with weights A / limit, in [-1, 1]."""
    advantages = advantages_of(scored, config)
    return grouped_selection(scored, {name: advantages.unit(name) for name in advantages.values}, advantages.counts)


def grouped_selection(scored: ScoredGroups, weights: Mapping[str, float], counts: AdvantageCounts) -> Selection:
    """Select all samples in order; dropped samples keep their position with weight 0."""
    ids = tuple(plan.sample_id for group in scored.groups for plan in group.samples)
    metrics = {f"select/{name}": float(value) for name, value in asdict(counts).items()}
    return Selection(sample_ids=ids, weights={name: weights.get(name, 0.0) for name in ids}, metrics=metrics)
