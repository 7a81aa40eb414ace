"""Diversity: distance between samples of one prompt, and the Vendi score on features that ignore noise."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from acpo_dist.evaluation.metrics.distances import SampleError, check_features
from acpo_dist.evaluation.metrics.features import Features
from acpo_dist.evaluation.metrics.manifold import exact_distances


@dataclass(frozen=True, kw_only=True)
class PromptDiversity:
    """Distances between samples of the same prompt."""

    mean_distance: float
    """Mean over prompts of the mean pairwise distance, in feature units."""
    by_prompt: dict[str, float]
    num_prompts: int
    """Number of prompts with at least two samples."""
    num_left_out: int
    """Number of prompts with one sample; they are excluded."""
    num_samples: int

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


def within_prompt_diversity(features: Tensor, prompts: Sequence[str]) -> PromptDiversity:
    """Compute the mean pairwise Euclidean distance between samples of the same prompt; prompts have equal weight.

    Args:
        features: (N, F).
        prompts: N prompts, or their ids.

    Returns:
        The distance in feature units, with the number of prompts.

    Raises:
        SampleError: the counts differ, no prompt has two samples, or a feature is not finite.
    """
    wide = check_features(features, minimum=2)
    if len(prompts) != len(wide):
        raise SampleError(f"{len(wide)} samples need as many prompts, found {len(prompts)}")
    rows: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(index)
    by_prompt = {prompt: mean_pairwise_distance(wide[found]) for prompt, found in rows.items() if len(found) > 1}
    if not by_prompt:
        raise SampleError(
            f"within-prompt diversity needs two samples of some prompt, found one of each of {len(rows)} prompts; "
            "raise rollout.samples_per_prompt"
        )
    return PromptDiversity(
        mean_distance=math.fsum(by_prompt.values()) / len(by_prompt), by_prompt=by_prompt, num_prompts=len(by_prompt),
        num_left_out=len(rows) - len(by_prompt), num_samples=sum(len(rows[prompt]) for prompt in by_prompt),
    )  # fmt: skip


def mean_pairwise_distance(features: Tensor) -> float:
    """Compute the mean Euclidean distance over all pairs of a set.

    Args:
        features: (N, F).

    Returns:
        The distance in feature units.

    Raises:
        SampleError: fewer than two samples, or a feature is not finite.
    """
    wide = check_features(features, minimum=2)
    return float(exact_distances(wide, wide).sum()) / (len(wide) * (len(wide) - 1))


def vendi_score(kernel_NN: Tensor) -> float:
    """Compute the effective number of different samples: exp(entropy of the eigenvalues of K / N).

    Args:
        kernel_NN: symmetric similarities (N, N) with a unit diagonal, positive semi-definite up to rounding.

    Returns:
        The score, from 1 to N.

    Raises:
        SampleError: `kernel_NN` is no such matrix.

    Source: Friedman and Dieng 2023.
    """
    kernel = check_features(kernel_NN, minimum=1, name="kernel")
    if kernel.shape[0] != kernel.shape[1] or not torch.allclose(kernel, kernel.T, atol=1e-6):
        raise SampleError(f"a Vendi kernel must be square and symmetric, found shape {tuple(kernel.shape)}")
    if not torch.allclose(kernel.diagonal(), torch.ones_like(kernel.diagonal()), atol=1e-6):
        raise SampleError("a Vendi kernel must have ones on its diagonal: similarity of a sample with itself")
    values = torch.linalg.eigvalsh(kernel / len(kernel))
    if float(values[0]) < -1e-6:
        raise SampleError(f"a Vendi kernel must be positive semi-definite, found the eigenvalue {float(values[0]):g}")
    values = values[values > 0]
    return float(torch.exp(-(values * values.log()).sum()))


def vendi_of_features(features: Features, *, bandwidth: float) -> float:
    """Compute the Vendi score with the kernel exp(-|x - y|^2 / (2 bandwidth^2)) on noise-blind features.

    On features that depend on noise the score rises when a model collapses to speckle, since each speckle is different.

    Args:
        features: features of an extractor that ignores noise.
        bandwidth: in feature units, equal for all compared sets; commonly the median distance of base samples.

    Returns:
        The score, from 1 to N.

    Raises:
        SampleError: the features depend on noise, or the bandwidth is not positive.
    """
    if not features.noise_blind:
        raise SampleError(
            f"`{features.source}` features depend on noise, on which a Vendi score rises when a model collapses. Use "
            "low-pass features, or another extractor that is declared noise-blind."
        )
    if not bandwidth > 0:
        raise SampleError(f"bandwidth must be positive, found {bandwidth}")
    wide = check_features(features.values, minimum=1)
    return vendi_score(torch.exp(-exact_distances(wide, wide).square() / (2 * bandwidth**2)))
