"""Several rewards as one: their weighted sum, less what they disagree by.

With weights w_k, W = sum_k w_k and qualities q_k (normalised, higher is better):

    m = sum_k w_k q_k / W      s^2 = sum_k w_k (q_k - m)^2 / W
    q = W (m - c s)            dq / dq_k = w_k (1 - c (q_k - m) / s)

c = 0 is the plain weighted sum. For two rewards of equal weight and c = 1, q is W times the lesser of the two.
K rewards, B samples.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_FLAT = 1e-12
"""Below this spread the rewards agree, and its slope, which is undefined there, is taken as 0."""


def compose(qualities: Sequence[float], weights: Sequence[float], spread: float = 0.0) -> float:
    """q of one sample.

    Args:
        qualities: one per reward.
        weights: likewise, positive.
        spread: c.
    """
    total = sum(weight * quality for weight, quality in zip(weights, qualities, strict=True))
    if spread == 0:
        return total
    whole = sum(weights)
    mean = total / whole
    variance = sum(weight * (quality - mean) ** 2 for weight, quality in zip(weights, qualities, strict=True)) / whole
    return total - spread * whole * math.sqrt(variance)


def composition_slopes(qualities_KB: Tensor, weights: Sequence[float], spread: float = 0.0) -> Tensor:
    """dq / dq_k of every sample, at least 0, shape (K, B).

    Where c (q_k - m) / s exceeds 1 the derivative is negative: q would rise by making the best reward worse. Such a
    reward gets slope 0.
    """
    shares = torch.tensor(weights, dtype=qualities_KB.dtype, device=qualities_KB.device)[:, None]
    slopes = shares.expand_as(qualities_KB)
    if spread == 0:
        return slopes
    offsets = qualities_KB - (shares * qualities_KB).sum(0) / shares.sum()
    deviation = ((shares * offsets.square()).sum(0) / shares.sum()).sqrt()
    leaning = torch.where(deviation > _FLAT, offsets / deviation.clamp(min=_FLAT), 0.0)
    return slopes * (1 - spread * leaning).clamp(min=0)
