"""Diversity of the images of a training run, cheap enough to compute at every iteration.

The gauge is the Vendi score minus 1 on low-pass features: 0 if all images of a block are equal, and insensitive to
speckle, which raises the score of raw pixels. A block contains the samples of one prompt if prompts have several
samples; otherwise it has a fixed number of images, because the score grows with their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor

from acpo_dist.core.by_size import Mixed, map_by_size
from acpo_dist.evaluation.metrics.diversity import vendi_of_features
from acpo_dist.evaluation.metrics.features import Features, LowPassPixels
from acpo_dist.evaluation.metrics.manifold import exact_distances

_SIZES = (8, 4, 2)
"""Candidate low-pass sizes; the largest one for which the images have enough pixels is used."""
_AT_ONCE = 8
"""Maximum number of images converted to float at a time."""


@dataclass(frozen=True, kw_only=True)
class SpreadGauge:
    """Diversity gauge fitted to base samples; all later images are measured with the same settings."""

    bandwidth: float
    """Kernel bandwidth in feature units: the median distance within blocks of base samples."""
    block: int
    """Images per block."""
    by_prompt: bool

    def measure(self, images: Mixed, prompts: Sequence[str]) -> float | None:
        """Measure diversity.

        Args:
            images: RGB (N, 3, H, W), or N images of several sizes.
            prompts: one per image.

        Returns:
            Mean over blocks of the Vendi score minus 1; None if no block is complete.
        """
        features = _features(images)
        rows = _blocks(prompts, self.block, by_prompt=self.by_prompt)
        if features is None or not rows:
            return None
        parts = [
            Features(values=features.values[row], source=features.source, noise_blind=features.noise_blind)
            for row in rows
        ]
        return fmean(vendi_of_features(part, bandwidth=self.bandwidth) - 1 for part in parts)


def fit_gauge(
    images: Mixed, prompts: Sequence[str], *, samples_per_prompt: int, per_iteration: int
) -> SpreadGauge | None:
    """Fit the gauge of a run to base samples.

    Args:
        images: RGB (N, 3, H, W), sampled from the base model.
        prompts: one per image.
        samples_per_prompt: samples per prompt of an iteration; from 2 on, only samples of one prompt are compared.
        per_iteration: images per iteration.

    Returns:
        The gauge; None if nothing can be compared: one image, images of a few pixels, or identical base samples.
    """
    by_prompt = samples_per_prompt > 1
    block = samples_per_prompt if by_prompt else min(per_iteration, len(images))
    features = _features(images)
    rows = _blocks(prompts, block, by_prompt=by_prompt)
    if features is None or block < 2 or not rows:
        return None
    above = torch.triu_indices(block, block, offset=1)
    distances = [exact_distances(features.values[row], features.values[row])[*above] for row in rows]
    bandwidth = float(median(torch.cat(distances).tolist()))
    return SpreadGauge(bandwidth=bandwidth, block=block, by_prompt=by_prompt) if bandwidth > 0 else None


def _features(images: Mixed) -> Features | None:
    pixels = min(image.shape[1] * image.shape[2] for image in images)
    size = next((size for size in _SIZES if pixels >= 16 * size**2), None)
    if size is None:
        return None
    extract = LowPassPixels(size)
    facts = extract(images[0][None])

    def values(part: Tensor) -> Tensor:
        return torch.cat([extract(few).values for few in part.split(_AT_ONCE)])

    return Features(values=map_by_size(images, values), source=facts.source, noise_blind=facts.noise_blind)


def _blocks(prompts: Sequence[str], block: int, *, by_prompt: bool) -> list[list[int]]:
    """Return the rows of each complete block; incomplete blocks are dropped."""
    sets: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        sets.setdefault(prompt if by_prompt else "", []).append(index)
    return [
        rows[start : start + block]
        for rows in sets.values()
        for start in range(0, len(rows) - block + 1, max(1, block))
    ]
