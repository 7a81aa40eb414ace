"""Frechet distance and KID agree with independent computations and report their sample counts."""

import itertools

import numpy as np
import pytest
import torch
from scipy import linalg

from acpo_dist.evaluation.metrics.distances import SampleError, frechet_distance, kid


def features(count: int, width: int, seed: int, *, shift: float = 0.0) -> torch.Tensor:
    """Correlated features with a few directions of nearly no variance, as from networks."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -3, width)
    return torch.randn(count, width, generator=generator) @ mixing + shift


def frechet_by_definition(a: torch.Tensor, b: torch.Tensor) -> float:
    """With scipy's general matrix square root of the product, as in published values."""
    x, y = a.double().numpy(), b.double().numpy()
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    difference = x.mean(0) - y.mean(0)
    return float(
        difference @ difference + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root).real
    )


@pytest.mark.parametrize(("count", "width"), [(400, 8), (600, 64), (66, 64)], ids=["easy", "wide", "barely enough"])
def test_the_frechet_distance_agrees_with_scipys_matrix_root(count: int, width: int):
    a, b = features(count, width, 0), 1.3 * features(count + 50, width, 1, shift=0.2)
    wanted = frechet_by_definition(a, b)
    # float64 on both sides; the roots of a nearly singular product agree to about half of its digits.
    assert frechet_distance(a, b).value == pytest.approx(wanted, rel=1e-6)


def test_the_frechet_distance_of_a_scaled_and_shifted_set_has_a_closed_form():
    a = features(300, 5, 0)
    centred = a - a.mean(0)
    # For S_b = c^2 S_a the cross term is c S_a.
    wanted = 5 * 0.25 + (2 - 1) ** 2 * float(torch.cov(a.double().T).trace())
    assert frechet_distance(centred, 2 * centred + 0.5).value == pytest.approx(wanted, rel=1e-5)


def test_a_set_has_no_distance_from_itself():
    assert frechet_distance(features(300, 20, 0), features(300, 20, 0)).value == pytest.approx(0, abs=1e-6)


def test_too_few_samples_for_a_covariance_are_refused():
    with pytest.raises(SampleError, match="at least 17 samples per set, found 16 and 40"):
        frechet_distance(features(16, 16, 0), features(40, 16, 1))


def test_shrinkage_makes_few_samples_usable_and_is_stated():
    result = frechet_distance(features(10, 16, 0), features(12, 16, 1), shrinkage=0.1)
    assert result.shrinkage == 0.1 and (result.num_a, result.num_b, result.width) == (10, 12, 16)
    assert result.value > 0


def test_a_distance_from_fewer_than_ten_samples_per_feature_is_marked():
    assert frechet_distance(features(79, 8, 0), features(200, 8, 1)).few_samples
    assert not frechet_distance(features(80, 8, 0), features(80, 8, 1)).few_samples


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(broken: float):
    a = features(40, 4, 0)
    a[3, 2] = broken
    with pytest.raises(SampleError, match="1 of 40 rows are not finite"):
        frechet_distance(a, features(40, 4, 1))


def test_sets_of_different_features_are_refused():
    with pytest.raises(SampleError, match="one extractor"):
        kid(features(40, 4, 0), features(40, 5, 1), subset_size=10)


def test_kid_agrees_with_the_sum_over_pairs():
    a, b = features(9, 4, 0).double(), features(9, 4, 1, shift=0.3).double()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / 4 + 1) ** 3

    within = [kernel(s[i], s[j]) for s in (a, b) for i, j in itertools.permutations(range(9), 2)]
    between = [kernel(x, y) for x in a for y in b]
    wanted = sum(within) / 72 - 2 * sum(between) / 81
    result = kid(a, b, subsets=3, subset_size=9)
    # Every subset is the whole set: what the three differ by is rounding, and no spread.
    assert result.mean == pytest.approx(wanted, rel=1e-9) and result.std is None
    # Half of the spread is missing where one of the sets is always the same.
    assert kid(a, torch.cat([b, b]), subsets=3, subset_size=9).std is None
    assert kid(a, b, subsets=1, subset_size=5).std is None and kid(a, b, subsets=3, subset_size=8).std > 0


def test_kid_of_one_distribution_is_unbiased():
    # Fresh sets each time.
    estimates = [
        kid(torch.randn(20, 6, generator=rng), torch.randn(20, 6, generator=rng), subsets=1, subset_size=20).mean
        for rng in (torch.Generator().manual_seed(seed) for seed in range(400))
    ]
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates)) < 4 * error
    # With the diagonal left in it would be about 2 (8 - 1) / 20.
    assert 4 * error < 0.1


def test_kid_subsets_follow_from_the_seed():
    a, b = features(60, 4, 0), features(50, 4, 1)
    first, again, other = (kid(a, b, subsets=5, subset_size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.mean != other.mean
    assert first.std > 0 and (first.num_a, first.num_b, first.subset_size) == (60, 50, 20)


def test_kid_subsets_larger_than_a_set_are_refused():
    with pytest.raises(SampleError, match="lower subset_size to 30"):
        kid(features(30, 4, 0), features(50, 4, 1), subset_size=31)
