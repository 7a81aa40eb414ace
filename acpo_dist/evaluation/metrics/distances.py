"""Frechet distance and KID between two sets of features, each with its sample counts.

Legend: N, M samples of the two sets, F feature width. All arithmetic is float64.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from acpo_dist.core.errors import UsageError


class SampleError(UsageError):
    """Too few samples for a metric, or features that cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class FrechetDistance:
    """Squared Wasserstein-2 distance between the Gaussians fitted to two sets."""

    value: float
    """In squared feature units."""
    num_a: int
    num_b: int
    width: int
    shrinkage: float
    few_samples: bool
    """Whether a set has fewer than 10 samples per feature. It biases the value upwards; compare equal counts only."""

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """KID: unbiased squared maximum mean discrepancy, as mean and standard deviation over random subsets."""

    mean: float
    """Mean over subsets. It can be slightly negative because the estimator is unbiased."""
    std: float | None
    """Population standard deviation over subsets; None for one subset, or if each contains a whole set."""
    num_a: int
    num_b: int
    subsets: int
    subset_size: int

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


def frechet_distance(features_a: Tensor, features_b: Tensor, *, shrinkage: float = 0.0) -> FrechetDistance:
    """Compute ||mu_a - mu_b||^2 + Tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2).

    Args:
        features_a: (N, F).
        features_b: (M, F).
        shrinkage: share s in [0, 1] of each covariance that is replaced by its mean variance times the identity:
            S <- (1 - s) S + s tr(S)/F I. Required for sets with N <= F.

    Returns:
        The distance with both sample counts.

    Raises:
        SampleError: a set has fewer than F + 1 samples (singular covariance) and `shrinkage` is 0, or the features are
            not two finite matrices of equal width.

    Source: Dowson and Landau 1982; Heusel et al. 2017.
    """
    if not 0 <= shrinkage <= 1:
        raise SampleError(f"shrinkage must lie in [0, 1], found {shrinkage}")
    a, b = check_pair(features_a, features_b, minimum=2)
    width = a.shape[1]
    fewest = min(len(a), len(b))
    if fewest <= width and shrinkage == 0:
        raise SampleError(
            f"a Frechet distance on {width} features needs at least {width + 1} samples per set, found {len(a)} and "
            f"{len(b)}: the covariance would be singular. Draw more samples, use fewer features, use KID, or set a "
            "shrinkage."
        )
    mean_a, covariance_a = _moments(a, shrinkage)
    mean_b, covariance_b = _moments(b, shrinkage)
    root = _symmetric_root(covariance_a)
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    value = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    # Rounding errors can make the distance of equal sets negative.
    return FrechetDistance(
        value=max(0.0, float(value)), num_a=len(a), num_b=len(b), width=width, shrinkage=shrinkage,
        few_samples=fewest < 10 * width,
    )  # fmt: skip


def kid(
    features_a: Tensor, features_b: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Compute the kernel distance with the kernel (x.y / F + 1)^3.

    Args:
        features_a: (N, F).
        features_b: (M, F).
        subsets: number of random subsets, each drawn without replacement.
        subset_size: samples per subset and set; at least 2 and at most min(N, M).
        seed: seed of the subsets.

    Returns:
        The distance with its spread and counts.

    Raises:
        SampleError: a set is smaller than `subset_size`, an argument is out of range, or the features do not match.

    Source: Binkowski et al. 2018, unbiased estimator.
    """
    a, b = check_pair(features_a, features_b, minimum=2)
    if subsets < 1 or subset_size < 2:
        raise SampleError(
            f"KID needs a subset of at least two samples, found subsets={subsets}, subset_size={subset_size}"
        )
    if subset_size > min(len(a), len(b)):
        raise SampleError(
            f"KID subsets of {subset_size} need as many samples in each set, found {len(a)} and {len(b)}. Draw more, "
            f"or lower subset_size to {min(len(a), len(b))} and state it with the result."
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        pick_a = torch.randperm(len(a), generator=generator)[:subset_size].to(a.device)
        pick_b = torch.randperm(len(b), generator=generator)[:subset_size].to(b.device)
        values.append(_unbiased_mmd(a[pick_a], b[pick_b]))
    estimates = torch.stack(values)
    varied = subsets > 1 and subset_size < min(len(a), len(b))
    std = float(estimates.std(correction=0)) if varied else None
    return KernelDistance(
        mean=float(estimates.mean()), std=std, num_a=len(a), num_b=len(b), subsets=subsets, subset_size=subset_size
    )


def check_features(features: Tensor, *, minimum: int, name: str = "features") -> Tensor:
    """Convert features to float64 and validate them.

    Args:
        features: (N, F).
        minimum: smallest accepted N.
        name: name of the features in error messages.

    Returns:
        Finite matrix (N, F), float64.

    Raises:
        SampleError: another shape, a non-finite value, or fewer than `minimum` rows.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise SampleError(f"{name} must be a matrix (samples, features), found shape {tuple(features.shape)}")
    if len(features) < minimum:
        raise SampleError(f"{name}: at least {minimum} samples are needed, found {len(features)}")
    wide = features.detach().double()
    if not torch.isfinite(wide).all():
        raise SampleError(f"{name}: {int((~torch.isfinite(wide)).any(1).sum())} of {len(wide)} rows are not finite")
    return wide


def check_pair(features_a: Tensor, features_b: Tensor, *, minimum: int) -> tuple[Tensor, Tensor]:
    """Convert two sets of features to float64 and validate them.

    Returns:
        Finite matrices (N, F) and (M, F), float64.

    Raises:
        SampleError: as `check_features`, or the widths differ.
    """
    a = check_features(features_a, minimum=minimum, name="first set")
    b = check_features(features_b, minimum=minimum, name="second set")
    if a.shape[1] != b.shape[1]:
        raise SampleError(
            f"features of {a.shape[1]} and {b.shape[1]} numbers cannot be compared: use one extractor for both sets"
        )
    return a, b


def _moments(features: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    mean = features.mean(0)
    centred = features - mean
    covariance = centred.T @ centred / (len(features) - 1)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return mean, (1 - shrinkage) * covariance + shrinkage * covariance.trace() / len(covariance) * identity


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _unbiased_mmd(a: Tensor, b: Tensor) -> Tensor:
    count = len(a)
    within_a, within_b, between = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    # The unbiased estimator excludes the diagonal, where a sample is compared with itself.
    within = (within_a.sum() - within_a.trace() + within_b.sum() - within_b.trace()) / (count * (count - 1))
    return within - 2 * between.mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
