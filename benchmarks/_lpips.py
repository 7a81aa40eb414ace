"""LPIPS with published weights (AlexNet), for studies: a distance between images that no reward here is trained on."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_LAYERS = ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))
"""torchvision's number, stride and padding of AlexNet's convolutions; max pooling comes before the second and third."""


class Lpips:
    """LPIPS (Zhang et al. 2018), version 0.1: 0 for equal images."""

    def __init__(self, weights: Path) -> None:
        """Load convolutions (torchvision's names) and heads (`lin0` to `lin4`) from a safetensors file."""
        self._weights = load_file(weights)

    @torch.no_grad()
    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the distances (B,) of images in [0, 1] of shape (B, 3, H, W)."""
        total = torch.zeros(len(images))
        for number, (x, y) in enumerate(zip(self._features(images), self._features(others), strict=True)):
            difference = (_unit(x) - _unit(y)).square()
            total += F.conv2d(difference, self._weights[f"lin{number}.model.1.weight"]).mean((1, 2, 3))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        x, found = (2 * images - 1 - shift) / scale, []
        for layer, stride, padding in _LAYERS:
            if layer in (3, 6):
                x = F.max_pool2d(x, 3, 2)
            weight, bias = (self._weights[f"features.{layer}.{part}"] for part in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, stride=stride, padding=padding).relu()
            found.append(x)
        return found


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
