"""Advantages relative to the prompt's group, with counts of excluded samples and groups."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acpo_dist.objective.composition import compose

# Keeps the division finite in groups that barely pass `min_std`.
_DELTA = 1e-8


@dataclass(frozen=True, kw_only=True)
class AdvantageCounts:
    """Counts by filter. A sample that fails several filters is counted under the first, in this order."""

    samples: int
    constant: int
    """Images of one flat colour."""
    non_finite: int
    """Samples for which an evaluator returned a non-finite score."""
    in_dropped_groups: int
    """Usable samples of dropped groups."""
    disagreeing: int
    """Samples that one evaluator scores above the group's mean and another below; kept unless `veto` is set."""
    kept: int
    groups: int
    small_groups: int
    """Groups dropped because fewer than two usable samples remained."""
    flat_groups: int
    """Groups dropped because their rewards have no spread."""


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """Advantages of the samples that are used in training."""

    values: Mapping[str, float]
    """Sample id -> A, in standard deviations above the group's mean, within +-limit; dropped samples are missing."""
    limit: float
    groups: tuple[tuple[str, ...], ...]
    """Ids of the kept samples by group."""
    counts: AdvantageCounts

    def unit(self, sample_id: str) -> float:
        """Return A / limit, in [-1, 1], the input of NFT."""
        return self.values[sample_id] / self.limit


def group_advantages(
    groups: Sequence[Sequence[str]],
    qualities: Mapping[str, Mapping[str, float]],
    weights: Mapping[str, float],
    *,
    spread: float = 0.0,
    limit: float = 5.0,
    min_std: float = 1e-3,
    min_vote: float = 0.0,
    veto: bool = False,
    across_groups: bool = False,
    constant: Collection[str] = (),
) -> Advantages:
    """Return A = (R - mean of the group) / (std of the group + delta), clipped, with R as in `compose`.

    The mean and the (population) standard deviation are over the group's usable samples, including vetoed ones.

    Args:
        groups: sample ids of each prompt's group.
        qualities: evaluator -> sample id -> quality, normalised and signed (higher is better).
        weights: evaluator -> weight in R; evaluators missing from `weights` vote but do not contribute to R.
        spread: c of the composition; 0 makes R the weighted sum.
        limit: A is clipped to +-limit.
        min_std: smallest standard deviation of R in a group that is kept; in the unit of R.
        min_vote: smallest distance from the group's mean, in the evaluator's own group standard deviations, at which
            an evaluator votes on a sample; 0 counts any difference. An evaluator whose qualities have a standard
            deviation below `min_std` in the group does not vote there.
        across_groups: divide by the standard deviation over all usable samples instead of the group's own.
        veto: drop samples on whose sign two evaluators disagree. They are counted in both cases.
        constant: ids of images of one flat colour, from `constant_images`.

    Raises:
        KeyError: a weighted evaluator or the score of a sample is missing.

    Source: group-relative advantages as in GRPO (Shao et al. 2024) and DDPO's per-prompt statistics.
    """

    def reward(name: str) -> float:
        return compose([qualities[metric][name] for metric in weights], list(weights.values()), spread)

    overall: float | None = None
    if across_groups:
        everyone = [n for group in groups for n in group if n not in constant and _is_finite(n, qualities)]
        overall = statistics.pstdev([reward(name) for name in everyone]) if everyone else 0.0
    values: dict[str, float] = {}
    kept_groups: list[tuple[str, ...]] = []
    num_constant = num_broken = num_dropped = num_disagreeing = num_small = num_flat = 0
    for group in groups:
        seen = [name for name in group if name not in constant]
        usable = [name for name in seen if _is_finite(name, qualities)]
        num_constant += len(group) - len(seen)
        num_broken += len(seen) - len(usable)
        rewards = [reward(name) for name in usable]
        if len(usable) < 2:
            num_small, num_dropped = num_small + 1, num_dropped + len(usable)
            continue
        if statistics.pstdev(rewards) < min_std:
            num_flat, num_dropped = num_flat + 1, num_dropped + len(usable)
            continue
        torn = _torn(usable, qualities, min_std, min_vote)
        num_disagreeing += len(torn)
        advantages = dict(zip(usable, _standardised(rewards, overall), strict=True))
        kept = tuple(name for name in usable if not (veto and name in torn))
        values |= {name: min(limit, max(-limit, advantages[name])) for name in kept}
        if kept:
            kept_groups.append(kept)
    counts = AdvantageCounts(
        samples=sum(len(group) for group in groups), constant=num_constant, non_finite=num_broken,
        in_dropped_groups=num_dropped, disagreeing=num_disagreeing, kept=len(values), groups=len(groups),
        small_groups=num_small, flat_groups=num_flat,
    )  # fmt: skip
    return Advantages(values=values, limit=limit, groups=tuple(kept_groups), counts=counts)


def constant_images(images: Tensor, min_std: float = 1 / 255) -> Tensor:
    """Find images of one flat colour: the standard deviation of every channel over the pixels is below `min_std`.

    Args:
        images: (B, C, H, W), uint8 in 0..255 or floating in 0..1.
        min_std: in units of the full range; the default is one uint8 level, above the rounding of a flat colour.

    Returns:
        bool (B,); also true for images with non-finite values.
    """
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    spread = (images.float() / scale).flatten(2).std(dim=2, correction=0)
    return ~(spread >= min_std).any(1) | ~spread.isfinite().all(1)


def _is_finite(name: str, qualities: Mapping[str, Mapping[str, float]]) -> bool:
    return all(math.isfinite(scores[name]) for scores in qualities.values())


def _standardised(values: Sequence[float], std: float | None = None) -> list[float]:
    mean = statistics.fmean(values)
    std = statistics.pstdev(values) if std is None else std
    return [(value - mean) / (std + _DELTA) for value in values]


def _torn(
    names: Sequence[str], qualities: Mapping[str, Mapping[str, float]], min_std: float, min_vote: float
) -> set[str]:
    """Return the samples with one vote above the group's mean and another below it."""
    above: set[str] = set()
    below: set[str] = set()
    for scores in qualities.values():
        own = [scores[name] for name in names]
        if statistics.pstdev(own) < min_std:
            continue
        for name, vote in zip(names, _standardised(own), strict=True):
            if vote > 0 and vote >= min_vote:
                above.add(name)
            if vote < 0 and -vote >= min_vote:
                below.add(name)
    return above & below
