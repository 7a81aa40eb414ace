"""Composition of several rewards: their weighted sum minus a penalty on their disagreement.

With weights w_k, W = sum_k w_k and qualities q_k (normalised, higher is better):

    m = sum_k w_k q_k / W      s^2 = sum_k w_k (q_k - m)^2 / W
    q = W (m - c s)            dq / dq_k = w_k (1 - c (q_k - m) / s)

c = 0 is the plain weighted sum. For two rewards of equal weight and c = 1, q is W times the smaller one.

Shapes: K rewards, B samples.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_FLAT = 1e-12
"""Spread below which the rewards are treated as equal and the undefined slope of the spread as 0."""


def compose(qualities: Sequence[float], weights: Sequence[float], spread: float = 0.0) -> float:
    """Return the composed quality q of one sample.

    Args:
        qualities: one per reward, normalised.
        weights: one per reward, positive.
        spread: c, the penalty on disagreement.
    """
    total = sum(weight * quality for weight, quality in zip(weights, qualities, strict=True))
    if spread == 0:
        return total
    whole = sum(weights)
    mean = total / whole
    variance = sum(weight * (quality - mean) ** 2 for weight, quality in zip(weights, qualities, strict=True)) / whole
    return total - spread * whole * math.sqrt(variance)


def composition_slopes(qualities_KB: Tensor, weights: Sequence[float], spread: float = 0.0) -> Tensor:
    """Return dq / dq_k of every sample, at least 0, shape (K, B).

    If c (q_k - m) / s exceeds 1, the derivative is negative, and q would increase by worsening the best reward. The
    slope of such a reward is set to 0.
    """
    shares = torch.tensor(weights, dtype=qualities_KB.dtype, device=qualities_KB.device)[:, None]
    slopes = shares.expand_as(qualities_KB)
    if spread == 0:
        return slopes
    offsets = qualities_KB - (shares * qualities_KB).sum(0) / shares.sum()
    deviation = ((shares * offsets.square()).sum(0) / shares.sum()).sqrt()
    leaning = torch.where(deviation > _FLAT, offsets / deviation.clamp(min=_FLAT), 0.0)
    return slopes * (1 - spread * leaning).clamp(min=0)
