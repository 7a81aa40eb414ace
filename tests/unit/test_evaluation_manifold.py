"""Precision, recall, density, coverage and diversity against brute force, and in cases with known values."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist

from acpo_dist.evaluation.metrics.distances import SampleError
from acpo_dist.evaluation.metrics.diversity import (
    mean_pairwise_distance,
    vendi_of_features,
    vendi_score,
    within_prompt_diversity,
)
from acpo_dist.evaluation.metrics.features import Features, LowPassPixels
from acpo_dist.evaluation.metrics.manifold import manifold_report


def cloud(count: int, width: int, seed: int, centre: float = 0.0) -> torch.Tensor:
    return centre + torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_brute_force(reference: np.ndarray, generated: np.ndarray, neighbours: int) -> tuple[float, float, float, float]:
    """Loops over samples and balls, with distances from scipy."""

    def radii(points: np.ndarray) -> list[float]:
        return [sorted(row)[neighbours] for row in cdist(points, points)]

    between = cdist(reference, generated)
    balls, generated_balls = radii(reference), radii(generated)
    precision = np.mean([any(between[i, j] <= balls[i] for i in range(len(reference))) for j in range(len(generated))])
    recall = np.mean(
        [any(between[i, j] <= generated_balls[j] for j in range(len(generated))) for i in range(len(reference))]
    )
    density = sum(between[i, j] <= balls[i] for i in range(len(reference)) for j in range(len(generated)))
    coverage = np.mean([min(between[i]) <= balls[i] for i in range(len(reference))])
    return float(precision), float(recall), float(density) / (neighbours * len(generated)), float(coverage)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_the_manifold_metrics_agree_with_brute_force(neighbours: int):
    reference, generated = cloud(60, 3, 0), 0.7 * cloud(45, 3, 1, centre=0.8)
    report = manifold_report(reference, generated, neighbours=neighbours)
    found = (report.precision, report.recall, report.density, report.coverage)
    # Counts of the same comparisons; the sets have no ties.
    assert found == pytest.approx(by_brute_force(reference.numpy(), generated.numpy(), neighbours), abs=1e-9)
    assert len({round(figure, 6) for figure in found}) == 4


def test_losing_a_mode_costs_recall_and_not_precision():
    reference = torch.cat([cloud(50, 4, 0), cloud(50, 4, 1, centre=20)])
    report = manifold_report(reference, cloud(100, 4, 2))
    assert report.precision > 0.8 and report.recall < 0.55


def test_copies_of_one_image_have_precision_and_no_recall():
    reference = cloud(50, 4, 0)
    report = manifold_report(reference, reference[:1].expand(30, -1))
    assert report.precision == 1.0 and report.recall == 1 / 50


def test_a_set_without_enough_neighbours_is_refused():
    with pytest.raises(SampleError, match="at least 4 samples"):
        manifold_report(cloud(3, 2, 0), cloud(30, 2, 1), neighbours=3)


def test_the_mean_pairwise_distance_agrees_with_scipy():
    points = cloud(17, 5, 0)
    assert mean_pairwise_distance(points) == pytest.approx(pdist(points.double().numpy()).mean(), rel=1e-12)


def test_within_prompt_diversity_ignores_what_lies_between_prompts():
    points = torch.tensor([[0.0], [2.0], [100.0], [106.0], [500.0]])
    result = within_prompt_diversity(points, ["a", "a", "b", "b", "c"])
    assert result.by_prompt == {"a": 2.0, "b": 6.0} and result.mean_distance == 4.0
    assert (result.num_prompts, result.num_left_out, result.num_samples) == (2, 1, 4)


def test_within_prompt_diversity_needs_two_samples_of_a_prompt():
    with pytest.raises(SampleError, match="samples_per_prompt"):
        within_prompt_diversity(cloud(3, 2, 0), ["a", "b", "c"])


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_the_vendi_score_counts_different_samples(groups: int):
    owner = torch.arange(12) % groups
    assert vendi_score((owner[:, None] == owner[None, :]).double()) == pytest.approx(groups, rel=1e-9)


def test_a_vendi_kernel_without_ones_on_its_diagonal_is_refused():
    with pytest.raises(SampleError, match="diagonal"):
        vendi_score(torch.eye(4) * 2)


def test_features_that_see_noise_get_no_vendi_score():
    with pytest.raises(SampleError, match="depend on noise"):
        vendi_of_features(Features(values=cloud(9, 2, 0), source="pixels", noise_blind=False), bandwidth=1)


def test_speckle_on_one_image_is_no_diversity_to_low_pass_features():
    generator = torch.Generator().manual_seed(0)
    variety = torch.rand(24, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    speckle = (variety[:1] + 0.4 * torch.randn(24, 3, 32, 32, generator=generator)).clamp(0, 1)

    def score(features: torch.Tensor, bandwidth: float) -> float:
        return vendi_of_features(Features(values=features, source="test", noise_blind=True), bandwidth=bandwidth)

    low, pixels = LowPassPixels(8), variety.flatten(1)
    blind = mean_pairwise_distance(low(variety).values) / 2
    seeing = mean_pairwise_distance(pixels) / 2
    # The trap: on pixels the collapsed set looks as varied as the real one.
    assert score(speckle.flatten(1), seeing) > 0.8 * score(pixels, seeing)
    assert score(low(speckle).values, blind) < 0.3 * score(low(variety).values, blind)
