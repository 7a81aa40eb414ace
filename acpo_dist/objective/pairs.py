"""Pairing of samples of one prompt, best with worst, with the reasons for excluded pairs."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from acpo_dist.objective.composition import compose


class Verdict(StrEnum):
    """Status of a pair; if several apply, the first in this order."""

    NON_FINITE = "non_finite"
    """An evaluator returned a non-finite score."""
    CONSTANT = "constant"
    """One of the images is of one flat colour."""
    MARGIN = "margin"
    """The rewards differ by less than the margin."""
    BEATEN = "beaten"
    """An evaluator prefers the loser."""
    DUPLICATE = "duplicate"
    """The two images are nearly the same."""
    KEPT = "kept"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Winner and loser among the samples of one prompt."""

    winner: str
    loser: str
    margin: float
    """Difference of their rewards, >= 0; NaN if one is not finite."""
    verdict: Verdict


def pair_group(
    names: Sequence[str], qualities: Mapping[str, Mapping[str, float]], weights: Mapping[str, float],
    *, spread: float = 0.0, margin: float = 0.0, absolute: bool = True, constant: Collection[str] = (),
    duplicate: Callable[[str, str], bool] | None = None,
) -> list[Pair]:  # fmt: skip
    """Pair best with worst, second best with second worst, and so on, so that every sample is in one pair.

    Args:
        names: sample ids of one group, an even number.
        qualities: evaluator -> sample id -> quality, normalised, higher is better.
        weights: evaluator -> weight in R, the composed reward (`compose`) by which samples are ranked.
        spread: c of the composition; 0 makes R the weighted sum.
        margin: smallest R_w - R_l of a usable pair.
        absolute: exclude pairs whose loser is preferred by an evaluator (NCP's absolute winners).
        constant: ids of images of one flat colour.
        duplicate: returns whether two images are nearly the same; called last, since it is the most expensive check.

    Raises:
        ValueError: the number of samples is odd.

    Source: NCP (IEEE Access 13:193745, 2025), for absolute winners.
    """
    if len(names) % 2:
        raise ValueError(f"pairs need an even number of samples per prompt, found {len(names)}")
    broken = {name for name in names if not all(math.isfinite(scores[name]) for scores in qualities.values())}
    rewards = {
        name: -math.inf
        if name in broken
        else compose([qualities[metric][name] for metric in weights], list(weights.values()), spread)
        for name in names
    }
    # Python's sort is stable, so ties are resolved by the order of the samples.
    ranked = sorted(names, key=lambda name: -rewards[name])
    pairs: list[Pair] = []
    for winner, loser in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
        gap = rewards[winner] - rewards[loser]
        if winner in broken or loser in broken:
            gap, verdict = math.nan, Verdict.NON_FINITE
        elif winner in constant or loser in constant:
            verdict = Verdict.CONSTANT
        elif gap <= 0 or gap < margin:
            verdict = Verdict.MARGIN
        elif absolute and any(scores[winner] < scores[loser] for scores in qualities.values()):
            verdict = Verdict.BEATEN
        elif duplicate is not None and duplicate(winner, loser):
            verdict = Verdict.DUPLICATE
        else:
            verdict = Verdict.KEPT
        pairs.append(Pair(winner=winner, loser=loser, margin=gap, verdict=verdict))
    return pairs


def nearly_same(first: Tensor, second: Tensor, threshold: float, *, size: int = 8) -> bool:
    """Return whether two images differ by less than `threshold` on a size x size grid.

    Area averages remove noise and single pixels, so that only layout and colour are compared.

    Args:
        first: uint8 (C, H, W).
        second: uint8 (C, h, w); an image of another size is compared as if resized to the first one's shape.
        threshold: rms difference, in units of the full range.
        size: side of the grid.
    """
    one, other = (F.interpolate(image[None].float() / 255, size=(size, size), mode="area") for image in (first, second))
    return float((one - other).square().mean().sqrt()) < threshold
