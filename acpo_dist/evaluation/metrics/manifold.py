"""Precision, recall, density and coverage: overlap of the nearest-neighbour manifolds of two sets of features."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from acpo_dist.evaluation.metrics.distances import SampleError, check_pair


@dataclass(frozen=True, kw_only=True)
class ManifoldReport:
    """Overlap of two sets. All values depend on the sample counts; compare equal counts only."""

    precision: float
    """Share of generated samples within the ball of a reference sample (fidelity)."""
    recall: float
    """Share of reference samples within the ball of a generated sample (diversity). A collapse lowers it first."""
    density: float
    """Mean number of reference balls around a generated sample, divided by k; can exceed 1; robust to outliers."""
    coverage: float
    """Share of reference samples whose own ball contains a generated sample."""
    neighbours: int
    num_reference: int
    num_generated: int

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


def manifold_report(reference: Tensor, generated: Tensor, *, neighbours: int = 3) -> ManifoldReport:
    """Compare two sets on balls that reach to each sample's k-th nearest neighbour in its own set.

    Args:
        reference: features of base samples or real images, (N, F).
        generated: features of the samples to evaluate, (M, F).
        neighbours: k; 3 to 5 is usual.

    Returns:
        The four metrics with the sample counts.

    Raises:
        SampleError: a set has no more than k samples, or the features do not match.

    Source: precision and recall Kynkaanniemi et al. 2019, density and coverage Naeem et al. 2020. A ball includes its
    boundary, so copies of one image (radius 0) lie in each other's balls.
    """
    if neighbours < 1:
        raise SampleError(f"neighbours must be at least 1, found {neighbours}")
    reference, generated = check_pair(reference, generated, minimum=neighbours + 1)
    reference_radius = _radii(reference, neighbours)
    generated_radius = _radii(generated, neighbours)
    between_NM = exact_distances(reference, generated)
    in_reference_NM = between_NM <= reference_radius[:, None]
    in_generated_NM = between_NM <= generated_radius[None, :]
    return ManifoldReport(
        precision=_share(in_reference_NM.any(0)),
        recall=_share(in_generated_NM.any(1)),
        density=float(in_reference_NM.sum(0).double().mean()) / neighbours,
        coverage=_share(in_reference_NM.any(1)),
        neighbours=neighbours, num_reference=len(reference), num_generated=len(generated),
    )  # fmt: skip


def exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Compute Euclidean distances (N, M) from differences; the expanded square cancels small distances."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, neighbours: int) -> Tensor:
    # The smallest distance of a row is the distance of the sample to itself, 0.
    return exact_distances(features, features).kthvalue(neighbours + 1, dim=1).values


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
