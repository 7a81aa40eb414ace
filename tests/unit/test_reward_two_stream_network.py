"""The TwoStream network: published size, gradient image, tiles and gradients."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from acpo_dist.rewards.two_stream import PUBLISHED, TOY, TwoStream, gradient_magnitude


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_published_size_has_the_published_number_of_parameters():
    def convolution(before: int, after: int, width: int) -> int:
        return before * after * width**2 + after

    def stream(channels: int) -> int:
        layers = [(channels, 32, 7), (32, 64, 5), (64, 128, 3), (128, 256, 3), (256, 9 * 24, 1)]
        return sum(convolution(*layer) for layer in layers)

    head = convolution(2 * 9 * 24, 512, 1) + convolution(512, 512, 1) + convolution(512, 1, 1)
    counted = sum(parameter.numel() for parameter in TwoStream(PUBLISHED).parameters())
    assert counted == stream(3) + stream(1) + head == 1_442_801


def test_the_gradient_image_is_sobels_magnitude():
    images = torch.rand(2, 3, 20, 24, generator=rng(0), dtype=torch.float64)
    luminance = np.tensordot(images.numpy(), [0.299, 0.587, 0.114], axes=([1], [0]))
    for found, grey in zip(gradient_magnitude(images)[:, 0], luminance, strict=True):
        # scipy's "nearest" is the replicated border.
        slopes = [ndimage.sobel(grey, axis=axis, mode="nearest") / 8 for axis in (0, 1)]
        # float32 weights of the luminance would show at 1e-8; this is float64.
        np.testing.assert_allclose(found, np.sqrt(slopes[0] ** 2 + slopes[1] ** 2 + 1e-6), rtol=0, atol=1e-12)


def test_the_gradient_image_of_a_flat_image_is_differentiable():
    flat = torch.full((1, 3, 32, 32), 0.4, requires_grad=True)
    gradient_magnitude(flat).sum().backward()
    assert bool(torch.isfinite(flat.grad).all())


@pytest.mark.parametrize(
    ("height", "width", "tops", "lefts", "painted"),
    [(64, 96, [0, 32], [0, 32, 64], [0, 32, 64]), (32, 44, [0], [0, 12], [0])],
    ids=["six tiles", "overlap"],
)
def test_large_images_score_the_mean_of_their_own_tiles(height: int, width: int, tops, lefts, painted):
    torch.manual_seed(0)
    network = TwoStream(TOY).eval().double().requires_grad_(False)
    images = torch.full((2, 3, height, width), 0.5, dtype=torch.float64)
    # Flat wherever a tile is cut: then a tile's gradient image is the same alone as within the whole.
    for top in tops:
        for left in painted:
            images[..., top + 4 : top + 28, left + 16 : left + 28] = torch.rand(2, 3, 24, 12, generator=rng(top + left))
    for image, score in zip(images, network(images), strict=True):
        alone = network(torch.stack([image[:, top : top + 32, left : left + 32] for top in tops for left in lefts]))
        assert float(alone.std()) > 0
        assert float(score) == pytest.approx(float(alone.mean()), abs=1e-12)


def test_every_pixel_counts_in_an_image_that_tiles_do_not_divide():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 37, 50, generator=rng(0)).requires_grad_(True)
    TwoStream(TOY).eval()(image).sum().backward()
    assert bool((image.grad.abs().sum((0, 1)) > 0).all())


@pytest.mark.parametrize("shape", [(1, 3, 31, 32), (1, 3, 32, 31), (1, 1, 32, 32), (3, 32, 32)])
def test_images_below_one_tile_or_without_three_channels_are_refused(shape: tuple):
    with pytest.raises(ValueError, match="RGB images of at least 32 x 32"):
        TwoStream(TOY)(torch.zeros(shape))


@pytest.mark.parametrize("size", [PUBLISHED, TOY], ids=["published", "toy"])
def test_every_parameter_gets_a_gradient(size):
    torch.manual_seed(0)
    network = TwoStream(size).eval()
    network(torch.rand(4, 3, 32, 32, generator=rng(0))).sum().backward()
    without = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
