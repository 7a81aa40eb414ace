"""Pairs of one prompt's samples, best against worst, and why some are left out."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from acpo_dist.objective.composition import compose


class Verdict(StrEnum):
    """What became of a pair; the first that applies, in this order."""

    NON_FINITE = "non_finite"
    """An evaluator gave no finite score."""
    CONSTANT = "constant"
    """One of the images has no content."""
    MARGIN = "margin"
    """The rewards differ by less than the margin."""
    BEATEN = "beaten"
    """Some evaluator prefers the loser."""
    DUPLICATE = "duplicate"
    """The two images are nearly the same."""
    KEPT = "kept"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two samples of one prompt."""

    winner: str
    loser: str
    margin: float
    """Difference of their rewards, >= 0; NaN where one is not finite."""
    verdict: Verdict


def pair_group(
    names: Sequence[str], qualities: Mapping[str, Mapping[str, float]], weights: Mapping[str, float],
    *, spread: float = 0.0, margin: float = 0.0, absolute: bool = True, constant: Collection[str] = (),
    duplicate: Callable[[str, str], bool] | None = None,
) -> list[Pair]:  # fmt: skip
    """Best with worst, second best with second worst, and so on: every sample of an even group is in one pair.

    Args:
        names: sample ids of one group, an even number.
        qualities: evaluator -> sample id -> quality, normalised, higher is better.
        weights: evaluator -> weight in R, by which samples are ranked, see `compose`.
        spread: c of the composition; 0 makes R the weighted sum.
        margin: smallest R_w - R_l of a pair that is kept.
        absolute: keep a pair only if no evaluator prefers its loser (NCP's absolute winners).
        constant: ids of images without content.
        duplicate: whether two images are nearly the same; asked last, since it costs most.

    Raises:
        ValueError: an odd number of samples.

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
    # Python's sort keeps the order of equals, so a tie does not depend on anything but the samples' order.
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
    """Whether two images differ by less than `threshold` (rms, in units of the full range) on a size x size grid.

    Area averages leave noise and single pixels out: what remains is layout and colour.

    Args:
        first: uint8 (C, H, W).
        second: uint8 (C, h, w); of another size, it is compared as if it were stretched to the first one's shape.
    """
    one, other = (F.interpolate(image[None].float() / 255, size=(size, size), mode="area") for image in (first, second))
    return float((one - other).square().mean().sqrt()) < threshold
