"""Frechet distance and KID against torchmetrics on the same features; precision and recall against NumPy alone."""

import numpy as np
import pytest
import torch
from torch import nn

from acpo_dist.evaluation.metrics.distances import frechet_distance, kid
from acpo_dist.evaluation.metrics.manifold import manifold_report

fid_module = pytest.importorskip("torchmetrics.image.fid", reason="needs torchmetrics")
kid_module = pytest.importorskip("torchmetrics.image.kid", reason="needs torchmetrics")
WIDTH = 12


class ChannelMeans(nn.Module):
    """Features of an image: the mean of every cell of a 2 x 2 grid, per channel."""

    num_features = WIDTH

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)


@pytest.fixture(scope="module")
def sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(300, 3, 8, 8, generator=generator)
    second = (0.7 * torch.rand(300, 3, 8, 8, generator=generator) + 0.2).clamp(0, 1)
    return first, second


def features_of(sets: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    network = ChannelMeans()
    return network(sets[0]), network(sets[1])


def test_the_frechet_distance_is_that_of_torchmetrics(sets):
    metric = fid_module.FrechetInceptionDistance(feature=ChannelMeans())
    metric.set_dtype(torch.float64)
    metric.update(sets[0], real=True)
    metric.update(sets[1], real=False)
    found = frechet_distance(*features_of(sets)).value
    assert found > 0.02
    # Both work in float64; what is left is the square root of a product of covariances, taken in two ways.
    assert found == pytest.approx(float(metric.compute()), abs=1e-8)


def test_kid_is_that_of_torchmetrics_on_whole_sets(sets):
    # A subset of everything is the same subset for both, whatever their random generators.
    metric = kid_module.KernelInceptionDistance(feature=ChannelMeans(), subsets=2, subset_size=300)
    metric.set_dtype(torch.float64)
    metric.update(sets[0], real=True)
    metric.update(sets[1], real=False)
    mean, std = metric.compute()
    found = kid(*features_of(sets), subsets=2, subset_size=300)
    assert found.mean == pytest.approx(float(mean), rel=1e-6, abs=1e-9)
    # torchmetrics gives what rounding makes of two equal numbers.
    assert found.std is None and float(std) == pytest.approx(0, abs=1e-9)


def test_precision_recall_density_and_coverage_are_those_of_the_definition(sets):
    real, drawn = (features.numpy() for features in features_of(sets))
    neighbours = 4

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def radii(points: np.ndarray) -> np.ndarray:
        return np.sort(distances(points, points), axis=1)[:, neighbours]

    between = distances(real, drawn)
    inside_real = between <= radii(real)[:, None]
    report = manifold_report(torch.from_numpy(real), torch.from_numpy(drawn), neighbours=neighbours)
    assert report.precision == pytest.approx(inside_real.any(0).mean(), abs=1e-12)
    assert report.recall == pytest.approx((between <= radii(drawn)[None]).any(1).mean(), abs=1e-12)
    assert report.density == pytest.approx(inside_real.sum(0).mean() / neighbours, abs=1e-12)
    assert report.coverage == pytest.approx((between.min(1) <= radii(real)).mean(), abs=1e-12)
    assert 0 < report.recall < 1
