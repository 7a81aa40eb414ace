"""Content statistics of known images, and against scipy and numpy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from acpo_dist.data.toy.world import templates
from acpo_dist.evaluation.metrics.content import STATISTICS, content_statistics


def plain(*rgb: float) -> torch.Tensor:
    return torch.tensor(rgb)[None, :, None, None].expand(1, 3, 16, 16)


def only(images: torch.Tensor, name: str) -> float:
    (value,) = content_statistics(images)[name].tolist()
    return value


def test_every_statistic_is_a_number_between_zero_and_one_per_image():
    statistics = content_statistics(templates()[:40])
    assert tuple(statistics) == STATISTICS
    for values in statistics.values():
        assert values.shape == (40,) and values.min() >= 0 and values.max() <= 1


@pytest.mark.parametrize(
    ("rgb", "dark", "saturated", "clipped"),
    [
        ((0.05, 0.05, 0.05), 1, 0, 0), ((0.0, 0.0, 0.0), 1, 0, 1), ((0.5, 0.5, 0.5), 0, 0, 0),
        ((0.9, 0.1, 0.1), 0, 1, 0), ((1.0, 0.5, 0.5), 0, 0, 1),
    ],
    ids=["dark", "black", "grey", "red", "over-exposed"],
)  # fmt: skip
def test_plain_images_have_different_statistics(rgb, dark: int, saturated: int, clipped: int):
    image = plain(*rgb)
    found = [only(image, name) for name in ("dark_share", "saturated_share", "clipped_share")]
    assert found == [dark, saturated, clipped]
    assert only(image, "edge_density") == only(image, "colour_entropy") == 0
    assert only(image, "contrast") == pytest.approx(0, abs=1e-6)


def test_the_edge_density_agrees_with_scipys_sobel():
    image = torch.rand(1, 3, 20, 24, generator=torch.Generator().manual_seed(0)) * 0.4
    luminance = np.tensordot([0.299, 0.587, 0.114], image[0].double().numpy(), 1)
    gradient = np.hypot(*(ndimage.sobel(luminance, axis, mode="nearest") / 8 for axis in (0, 1)))
    wanted = float((gradient > 0.08).mean())
    assert 0.05 < wanted < 0.95
    # One pixel of 480 may sit on the threshold in float32.
    assert only(image, "edge_density") == pytest.approx(wanted, abs=1.5 / 480)


def test_the_colour_entropy_agrees_with_numpys_histogram():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).square()
    counts, _ = np.histogramdd(image[0].flatten(1).T.double().numpy(), bins=8, range=[(0, 1)] * 3)
    share = counts[counts > 0] / counts.sum()
    assert only(image, "colour_entropy") == pytest.approx(-(share * np.log(share)).sum() / np.log(512), abs=1e-5)


def test_bytes_and_floats_of_one_image_agree():
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    for name, values in content_statistics(images).items():
        assert values.tolist() == content_statistics(images.double() / 255)[name].tolist(), name


def test_statistics_do_not_depend_on_the_batch():
    images = templates()[::100]
    together = content_statistics(images)
    for index, image in enumerate(images):
        for name, values in content_statistics(image[None]).items():
            # Reductions over a batch may add in another order.
            assert float(values) == pytest.approx(float(together[name][index]), abs=1e-6)


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8).long()])
def test_what_is_no_image_is_refused(images: torch.Tensor):
    with pytest.raises(ValueError, match="expected RGB images"):
        content_statistics(images)


def test_pixels_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        content_statistics(torch.full((1, 3, 8, 8), float("nan")))
