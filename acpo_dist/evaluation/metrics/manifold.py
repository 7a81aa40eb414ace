"""Precision, recall, density and coverage: how far two sets of features share their nearest-neighbour manifolds."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from acpo_dist.evaluation.metrics.distances import SampleError, check_pair


@dataclass(frozen=True, kw_only=True)
class ManifoldReport:
    """Shares of samples; all depend on the counts, so compare only at equal counts."""

    precision: float
    """Share of generated samples within the ball of some reference sample: are they real?"""
    recall: float
    """Share of reference samples within the ball of some generated one: is everything still there? Falls first."""
    density: float
    """Mean number of reference balls round a generated sample over k; can exceed 1, and forgives outliers."""
    coverage: float
    """Share of reference samples whose own ball holds a generated one."""
    neighbours: int
    num_reference: int
    num_generated: int

    def to_mapping(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def manifold_report(reference: Tensor, generated: Tensor, *, neighbours: int = 3) -> ManifoldReport:
    """Compare two sets on balls that reach to each sample's k-th nearest neighbour in its own set.

    Args:
        reference: features of base samples or real images, (N, F).
        generated: features of the samples to be judged, (M, F).
        neighbours: k; 3 to 5 is usual.

    Raises:
        SampleError: a set has no more than k samples, or the features do not fit.

    Source: precision and recall Kynkaanniemi et al. 2019, density and coverage Naeem et al. 2020. A ball holds its
    rim, so that copies of one image (radius 0) lie in each other's balls.
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
    """Euclidean distances (N, M); from differences, since the expanded square loses small ones to cancellation."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, neighbours: int) -> Tensor:
    # The smallest distance of a row is the sample's own, 0.
    return exact_distances(features, features).kthvalue(neighbours + 1, dim=1).values


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
