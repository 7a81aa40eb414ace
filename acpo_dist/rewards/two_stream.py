"""TwoStream-IQA: an image stream and a gradient-magnitude stream, position-sensitive pooling, mean over patches.

An own differentiable definition of the published design (Yan, Gong and Zhang, IEEE TIP 28(5), 2019): luminance
gradients by Sobel filters with a smooth magnitude, three pooling stages per stream, R-FCN-like position-sensitive
pooling over 3 x 3 bins, and the mean over 32 x 32 tiles of larger images, or over a fixed number of tiles, drawn once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acpo_dist.rewards.config import PATCHES

PATCH = 32
_BINS = 3
_TILES_AT_ONCE = 256
"""Tiles per forward pass; bounds the memory for any batch and image size."""


@dataclass(frozen=True, kw_only=True)
class TwoStreamSize:
    """Widths of the network."""

    channels: tuple[int, int, int, int] = (32, 64, 128, 256)
    per_bin: int = 24
    hidden: int = 512
    dropout: float = 0.5


PUBLISHED = TwoStreamSize()
TOY = TwoStreamSize(channels=(12, 16, 24, 32), per_bin=6, hidden=48, dropout=0.1)


def gradient_magnitude(images: Tensor) -> Tensor:
    """Luminance gradient, differentiable everywhere: (B, 3, H, W) in [0, 1] -> (B, 1, H, W)."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype, device=images.device)
    luminance = (images * weights[:, None, None]).sum(1, keepdim=True)
    sobel = (
        torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=images.dtype, device=images.device)
        / 8
    )
    kernel = torch.stack([sobel, sobel.T])[:, None]
    slopes = F.conv2d(F.pad(luminance, (1, 1, 1, 1), mode="replicate"), kernel)
    return (slopes.square().sum(1, keepdim=True) + 1e-6).sqrt()


class _Stream(nn.Module):
    def __init__(self, in_channels: int, size: TwoStreamSize) -> None:
        super().__init__()
        first, second, third, fourth = size.channels
        maps = _BINS * _BINS * size.per_bin
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, first, 7, padding=3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(second, third, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(third, fourth, 3, padding=1), nn.ReLU(),
            nn.Conv2d(fourth, maps, 1), nn.ReLU(),
        )  # fmt: skip
        self.per_bin = size.per_bin

    def forward(self, patches: Tensor) -> Tensor:
        maps = F.adaptive_avg_pool2d(self.features(patches), _BINS)
        batch = maps.shape[0]
        maps = maps.reshape(batch, _BINS * _BINS, self.per_bin, _BINS * _BINS)
        # Bin k is read only from its own group of channels, which makes the pooling position-sensitive.
        return maps.diagonal(dim1=1, dim2=3).reshape(batch, -1)


class TwoStream(nn.Module):
    """Quality in [0, 1] (0 bad, 1 good) of RGB images in [0, 1]; higher is better."""

    def __init__(self, size: TwoStreamSize = PUBLISHED) -> None:
        super().__init__()
        self.image_stream = _Stream(3, size)
        self.gradient_stream = _Stream(1, size)
        features = 2 * _BINS * _BINS * size.per_bin
        self.head = nn.Sequential(
            nn.Linear(features, size.hidden), nn.ReLU(), nn.Dropout(size.dropout),
            nn.Linear(size.hidden, size.hidden), nn.ReLU(), nn.Dropout(size.dropout),
            nn.Linear(size.hidden, 1),
        )  # fmt: skip

    def forward(self, images: Tensor, *, patches: int = PATCHES, seed: int = 0) -> Tensor:
        """Score images.

        Args:
            images: (B, 3, H, W) in [0, 1], H and W at least 32; larger images are tiled, a remainder at the right
                and lower edge is covered by a last overlapping tile.
            patches: maximum number of tiles per image. For larger images this many are drawn uniformly from `seed`
                and the image size, the same in every call and batch.
            seed: seed of the drawn tiles.

        Returns:
            Scores of shape (B,), the mean over tiles.

        Raises:
            ValueError: an image smaller than one tile, or not three channels.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < PATCH:
            raise ValueError(
                f"TwoStream needs RGB images of at least {PATCH} x {PATCH}, found shape {tuple(images.shape)}"
            )
        corners = tile_corners(*images.shape[2:], patches=patches, seed=seed)
        planes = torch.cat([images, gradient_magnitude(images)], 1)
        # Process tiles in chunks over all images, so that tensors do not grow with the image size.
        step = max(1, _TILES_AT_ONCE // len(images))
        chunks = [corners[start : start + step] for start in range(0, len(corners), step)]
        if len(chunks) == 1 or self.training or not torch.is_grad_enabled():
            scores = [self._tiles(planes, chunk) for chunk in chunks]
        else:
            # The backward pass recomputes the maps of a chunk instead of storing the maps of all chunks.
            scores = [checkpoint(self._tiles, planes, chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(scores).mean(0)

    def _tiles(self, planes: Tensor, corners: list[tuple[int, int]]) -> Tensor:
        """Score (T, B) the tiles at these corners; planes are RGB and gradient magnitude (B, 4, H, W)."""
        tiles = torch.cat([planes[..., y : y + PATCH, x : x + PATCH] for y, x in corners])
        features = torch.cat([self.image_stream(tiles[:, :3] - 0.5), self.gradient_stream(tiles[:, 3:])], 1)
        return self.head(features).reshape(len(corners), planes.shape[0])


def tile_corners(height: int, width: int, *, patches: int, seed: int) -> list[tuple[int, int]]:
    """Return the upper left corners (y, x) of the tiles of an image, or of `patches` tiles drawn from the seed."""
    corners = [(y, x) for y in _tile_starts(height) for x in _tile_starts(width)]
    if len(corners) <= patches:
        return corners
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(corners), generator=generator)[:patches]
    return [corners[index] for index in sorted(drawn.tolist())]


def _tile_starts(length: int) -> list[int]:
    starts = list(range(0, length - PATCH + 1, PATCH))
    if starts[-1] != length - PATCH:
        starts.append(length - PATCH)
    return starts
