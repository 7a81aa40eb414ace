"""LPIPS for studies: a distance between images that no reward here is trained on.

The published linear heads of LPIPS 0.1 on the features of torchvision's AlexNet trained on ImageNet.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchvision.models import alexnet

_TAPS = (1, 4, 7, 9, 11)
"""Layers of `features` whose outputs are compared: the ReLU after each convolution."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Normalisation of images in [-1, 1], as in the published code."""


class Lpips:
    """LPIPS (Zhang et al. 2018), version 0.1, AlexNet: 0 for equal images."""

    def __init__(self, weights: Path) -> None:
        """Load the convolutions (torchvision's names) and the heads (`lin0.model.1.weight` to `lin4.model.1.weight`).

        Args:
            weights: safetensors file.
        """
        if not weights.is_file():
            raise SystemExit(
                f"no LPIPS weights at {weights}: expected a safetensors file with torchvision's AlexNet features and "
                "the heads lin0 to lin4 of the package `lpips`. Give the folder of `iqa/` with --data."
            )
        found = load_file(weights)
        heads = [f"lin{number}.model.1.weight" for number in range(len(_TAPS))]
        self._heads = [found.pop(name) for name in heads]
        self._layers = alexnet(weights=None).features[: _TAPS[-1] + 1].eval()
        self._layers.load_state_dict({name.removeprefix("features."): value for name, value in found.items()})

    @torch.no_grad()
    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the distances (B,) of images in [0, 1] of shape (B, 3, H, W)."""
        total = torch.zeros(len(images))
        for head, x, y in zip(self._heads, self._features(images), self._features(others), strict=True):
            total += F.conv2d((_unit(x) - _unit(y)).square(), head).mean((1, 2, 3))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        x, found = (2 * images - 1 - shift) / scale, []
        for number, layer in enumerate(self._layers):
            x = layer(x)
            if number in _TAPS:
                # No later layer changes it: the only layers in place are ReLU, each on the output of a convolution.
                found.append(x)
        return found


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
