"""TwoStream scores large images by a fixed sample of their tiles, in bounded memory and with the exact gradient."""

import pytest
import torch
from torch import Tensor

from acpo_dist.rewards.metrics import TwoStreamMetric
from acpo_dist.rewards.two_stream import TOY, TwoStream, gradient_magnitude, tile_corners


def image(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network() -> TwoStream:
    torch.manual_seed(0)
    return TwoStream(TOY).eval().requires_grad_(False)


def test_images_up_to_512_are_seen_whole_and_larger_ones_by_as_many_tiles():
    assert len(tile_corners(512, 512, patches=256, seed=0)) == 256
    drawn = tile_corners(1024, 1024, patches=256, seed=0)
    assert len(set(drawn)) == 256 and set(drawn) < set(tile_corners(1024, 1024, patches=1024, seed=0))
    assert drawn == tile_corners(1024, 1024, patches=256, seed=0) != tile_corners(1024, 1024, patches=256, seed=1)


def test_every_tile_is_drawn_equally_often_over_the_seeds():
    seen = torch.zeros(16)
    for seed in range(800):
        for y, x in tile_corners(128, 128, patches=4, seed=seed):
            seen[y // 32 * 4 + x // 32] += 1
    # 200 of 800 expected, standard deviation 12.
    assert bool(((seen - 200).abs() < 60).all())


def test_the_score_of_a_large_image_is_the_mean_over_the_drawn_tiles(network: TwoStream):
    image_CHW = image(1, 160, 224)
    corners = tile_corners(160, 224, patches=7, seed=3)
    planes = torch.cat([image_CHW, gradient_magnitude(image_CHW)], 1)
    tiles = torch.cat([planes[..., y : y + 32, x : x + 32] for y, x in corners])
    features = [network.image_stream(tiles[:, :3] - 0.5), network.gradient_stream(tiles[:, 3:])]
    wanted = network.head(torch.cat(features, 1)).mean()
    torch.testing.assert_close(network(image_CHW, patches=7, seed=3)[0], wanted)


def test_scores_and_gradients_of_large_images_do_not_depend_on_the_batch(network: TwoStream):
    def ask(images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.clone().requires_grad_(True)
        scores = network(images, patches=40)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        return scores.detach(), gradient

    # 16 images of 40 tiles: three chunks, recomputed in the backward pass; alone each is one chunk, which is not.
    images = image(16, 256, 288)
    together, gradients = ask(images)
    for row in (0, 7, 15):
        score, gradient = ask(images[row : row + 1])
        torch.testing.assert_close(together[row], score[0], rtol=1e-5, atol=1e-6)
        assert float((gradients[row] - gradient[0]).norm() / gradient.norm()) < 1e-5


def test_what_is_kept_for_the_gradient_does_not_grow_with_the_tiles(network: TwoStream):
    def kept(size: int) -> float:
        """Bytes saved for the backward pass per byte of the images."""
        images = image(1, size, size).requires_grad_(True)
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            score = network(images, patches=1024)
        (gradient,) = torch.autograd.grad(score.sum(), images)
        assert bool(torch.isfinite(gradient).all())
        return sum(found.values()) / (images.numel() * 4)

    assert kept(768) < 4 < kept(512)


def test_the_metric_takes_the_number_of_tiles_and_the_seed_from_its_configuration():
    image_CHW = image(1, 96, 96)
    scores = [
        float(TwoStreamMetric(TwoStreamMetric.Config(patches=patches, seed=seed))(image_CHW, [""])[0])
        for patches, seed in ((256, 0), (2, 0), (2, 0), (2, 1))
    ]
    assert scores[1] == scores[2] and len(set(scores)) == 3
