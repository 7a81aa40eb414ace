"""Image with a known score, which distinguishes a faulty replica from an image that cannot be scored."""

from math import isfinite

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from acpo_dist.core.errors import AcpoError, RewardError
from acpo_dist.workers.reward.worker import RewardWorker

_SIZES = (64, 32, 224, 512)
"""Side lengths that are tried in turn until the metric accepts one; small, since the canary is scored often."""
_TOLERANCE = 1e-3
"""Largest relative difference between two scores of the canary, far above rounding between devices."""
_PROMPT = "a photograph"


class Canary:
    """An image that is scored when the worker starts, and again to check the worker."""

    def __init__(self, worker: RewardWorker) -> None:
        """Find the size and take the first score.

        Raises:
            RewardError: the metric has no finite score for the image at any size.
        """
        self._worker = worker
        problems: dict[str, list[str]] = {}
        for size in _SIZES[:1] if worker.on_latents else _SIZES:
            self.image = latent_canary(worker.latent_shape) if worker.on_latents else canary(size)
            try:
                self.reference = self._score()
                return
            except (AcpoError, RuntimeError, ValueError) as error:
                problems.setdefault(str(error), []).append(f"{size} x {size}")
        raise RewardError(
            f"reward `{worker.name}` has no finite score for a plain image, so it cannot be used:"
            + "; ".join(f"{', '.join(sizes)}: {text}" for text, sizes in problems.items())
        )

    def check(self) -> None:
        """Score the image again and compare.

        Raises:
            RewardError: the score is not finite, differs from the first, or cannot be computed.
        """
        self.compare(self.reference, "at the start")

    def compare(self, reference: float, where: str) -> None:
        """Score the image and compare with a reference.

        Raises:
            RewardError: as in `check`.
        """
        try:
            found = self._score()
        except (RuntimeError, ValueError, MemoryError) as error:
            raise RewardError(f"reward `{self._worker.name}` can no longer score the canary: {error}") from error
        if not agree(found, reference):
            raise RewardError(
                f"reward `{self._worker.name}` scores the canary {found:.6g}, but {reference:.6g} {where}"
            )

    def _score(self) -> float:
        (score,) = self._worker.score(self.image, [_PROMPT])
        return score


def agree(found: float, reference: float) -> bool:
    """Return whether two scores of the canary are equal up to differences between devices."""
    return isfinite(found) and abs(found - reference) <= _TOLERANCE * max(abs(reference), 0.01)


def latent_canary(shape: tuple[int, int, int]) -> Tensor:
    """Return latents of unit variance, always the same: float32 (1, C, h, w)."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(20190819))


def canary(size: int) -> Tensor:
    """Return coloured blobs with noise, always the same: uint8 (1, 3, size, size)."""
    generator = torch.Generator().manual_seed(20190819)
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    noisy = smooth + 0.05 * torch.randn(1, 3, size, size, generator=generator)
    return (noisy.clamp(0, 1) * 255).to(torch.uint8)
