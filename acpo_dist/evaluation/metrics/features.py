"""Feature extractors for distances, recall and diversity. They download nothing.

Legend: N samples, F feature width, H W pixels.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from acpo_dist.core.errors import ModelError
from acpo_dist.core.registry import resolve

_MIN_BLOCK = 16
"""Minimum number of pixels averaged into one low-pass value; with fewer, speckle remains visible."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of a set of samples and their properties."""

    values: Tensor
    """float32 (N, F), on the CPU."""
    source: str
    """Extractor name and all settings that change the values. Features of different sources cannot be compared."""
    noise_blind: bool
    """Whether the features are insensitive to pixel noise."""


class Extractor(Protocol):
    """Computes features of samples; the result does not depend on the batch size."""

    def __call__(self, samples: Tensor) -> Features:
        """Compute features of images (N, 3, H, W), uint8 or float in [0, 1]."""
        ...


def as_float(images: Tensor) -> Tensor:
    """Convert images to float32, clipped to [0, 1].

    Args:
        images: RGB (N, 3, H, W), uint8 or float.

    Returns:
        RGB (N, 3, H, W), float32 in [0, 1].

    Raises:
        ValueError: another shape or type, or a non-finite pixel.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(f"expected RGB images (N, 3, H, W), uint8 or float, found {images.dtype} {(*images.shape,)}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not torch.isfinite(images).all():
        raise ValueError("images hold pixels that are not finite")
    return images.float().clamp(0, 1)


class LowPassPixels:
    """Images averaged down to a few pixels, which keep layout and colour but not noise and fine texture."""

    def __init__(self, size: int = 8) -> None:
        """Initialise the extractor.

        Args:
            size: height and width of the averaged image.
        """
        self._size = size

    def __call__(self, samples: Tensor) -> Features:
        """Compute features.

        Args:
            samples: RGB (N, 3, H, W), uint8 or float in [0, 1].

        Returns:
            Features (N, 3 size^2) in [0, 1].

        Raises:
            ValueError: `samples` are no images, or so small that a value averages fewer than 16 pixels.
        """
        images = as_float(samples)
        if images.shape[2] * images.shape[3] < _MIN_BLOCK * self._size**2:
            raise ValueError(
                f"low-pass features of size {self._size} need {_MIN_BLOCK} pixels per value, found images of "
                f"{images.shape[2]} x {images.shape[3]}; lower the size"
            )
        values = nn.functional.adaptive_avg_pool2d(images, self._size).flatten(1).cpu()
        return Features(values=values, source=f"low-pass-{self._size}", noise_blind=True)


class NetworkFeatures:
    """Features of any torch module that maps images to (N, F), such as a classifier."""

    def __init__(self, network: nn.Module, *, name: str, noise_blind: bool = False, batch_size: int = 64) -> None:
        """Initialise the extractor and set the module to `eval`.

        Args:
            network: module for float images in [0, 1].
            name: name of the features in reports.
            noise_blind: whether the module is insensitive to noise.
            batch_size: images per forward pass.
        """
        self._network, self._name = network.eval().requires_grad_(False), name
        self._noise_blind, self._batch = noise_blind, batch_size

    @classmethod
    def load(cls, target: str, weights: Path, *, noise_blind: bool = False) -> "NetworkFeatures":
        """Build the class `module:Class` without arguments and load safetensors weights into it.

        Args:
            target: `module:Class`.
            weights: safetensors file.
            noise_blind: whether the module is insensitive to noise.

        Returns:
            The extractor.

        Raises:
            ConfigError: the class does not exist.
            ModelError: the weights are missing, unreadable or do not match the class.
        """
        network = resolve("feature network", {}, target)()
        try:
            network.load_state_dict(load_file(str(_existing(weights, "feature network weights"))))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ModelError(f"{weights} does not fit `{target}`: {str(error).splitlines()[0]}") from error
        return cls(network, name=f"{target}:{_digest(weights)}", noise_blind=noise_blind)

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Features:
        """Compute features (N, F); a spatial output is averaged.

        Raises:
            ModelError: the module's output is neither (N, F) nor (N, F, h, w).
        """
        values = torch.cat([self._run(batch) for batch in as_float(samples).split(self._batch)])
        return Features(values=values.float().cpu(), source=self._name, noise_blind=self._noise_blind)

    def _run(self, images: Tensor) -> Tensor:
        output = self._network(images)
        if not isinstance(output, Tensor) or output.ndim not in (2, 4) or len(output) != len(images):
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ModelError(f"`{self._name}` must give (N, F) or (N, F, h, w) for {len(images)} images, gave {found}")
        return output if output.ndim == 2 else output.mean((2, 3))


class InceptionFeatures:
    """The Inception network of published FID values, from a local TorchScript file.

    The file is `inception-2015-12-05.pt`, which several public FID tools share. The network takes uint8 images of any
    size, resizes them itself and, with `return_features=True`, returns (N, 2048).
    """

    def __init__(self, weights: Path, *, batch_size: int = 32) -> None:
        """Load the network.

        Args:
            weights: TorchScript file.
            batch_size: images per forward pass.

        Raises:
            ModelError: the file is missing or is no TorchScript network.
        """
        path = _existing(weights, "Inception weights")
        try:
            self._network: Any = torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{path} is no TorchScript network: {str(error).splitlines()[0]}") from error
        self._source, self._batch = f"inception:{_digest(path)}", batch_size

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Features:
        """Compute features (N, 2048)."""
        images = (as_float(samples) * 255).round().to(torch.uint8)
        values = torch.cat([self._network(batch, return_features=True) for batch in images.split(self._batch)])
        return Features(values=values.float(), source=self._source, noise_blind=False)


def _existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ModelError(
            f"{what}: expected a file at {path}, found none. Nothing is downloaded: put it there, or choose low-pass "
            "or own network features."
        )
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
