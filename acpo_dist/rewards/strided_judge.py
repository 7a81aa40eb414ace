"""Judge with a different design from TwoStream: strided residual convolutions, GELU, mean and standard deviation.

It is never used in an update. Architecture, activation, input (no gradient image), damage family and seed differ from
the reward's, so that the judge does not share the reward's weaknesses.
"""

import torch
from torch import Tensor, nn

SMALLEST = 16
"""Minimum height and width of an image."""


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(4, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.body(maps)


class StridedJudge(nn.Module):
    """Quality in [0, 1] (0 bad, 1 good) of RGB images in [0, 1], any size from 16 x 16 up; higher is better."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.stages = nn.Sequential(
            _Residual(width),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), _Residual(2 * width),
            nn.Conv2d(2 * width, 2 * width, 4, stride=2, padding=1), _Residual(2 * width),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(4 * width, 32), nn.GELU(), nn.Linear(32, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> scores of shape (B,)."""
        maps = self.stages(self.stem(2 * images - 1))
        pooled = torch.cat([maps.mean((2, 3)), maps.std((2, 3))], 1)
        return torch.sigmoid(self.head(pooled)).flatten()
