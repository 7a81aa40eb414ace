"""The reward worker: scores images, and returns the gradient of a score at x0-hat or at an image. Stateless."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from acpo_dist.core.errors import RewardError
from acpo_dist.core.registry import MODELS, REWARDS, resolve
from acpo_dist.objective.perceptual import clip_pixels
from acpo_dist.workers.reward.memory import in_halves
from acpo_dist.workers.reward.wire import WireTensor, pack, unpack

Part = TypeVar("Part")

CHUNK = 16
"""Most images per forward unless told otherwise, however many are asked together."""


class NonFiniteScoreError(RewardError):
    """The metric answered finite images with a score or a gradient that is not finite."""


@dataclass(frozen=True)
class ScoredGradient:
    """Raw scores (B,) and their gradient with respect to what was sent, at what was sent."""

    scores: list[float]
    gradient: WireTensor

    def rows(self, start: int, stop: int) -> "ScoredGradient":
        """The answer for the images from `start` to before `stop`."""
        return ScoredGradient(self.scores[start:stop], self.gradient.rows(start, stop))


class RewardWorker:
    """One metric with, for the latent cut, its own copy of the decoder."""

    def __init__(
        self, metric: Any, *, model: Any | None, cut: str, wire_dtype: str, device: str = "cpu", max_batch: int = CHUNK
    ) -> None:
        """Load the metric and, for the latent cut, the decoder.

        Args:
            metric: the metric's configuration section.
            model: the model's section; needed for the latent cut of a metric that gives gradients.
            cut: `latent` or `image`.
            max_batch: most images per forward; fewer where the memory does not last.
        """
        self.name = metric.name
        self._metric = resolve("reward", REWARDS, metric.type)(metric, device=device)
        self._ascend = metric.direction > 0
        self._decoder = (
            resolve("model", MODELS, model.type).load_decoder(model, device=device) if model is not None else None
        )
        self._cut, self._wire_dtype, self._device = cut, wire_dtype, device
        self._max_batch = max_batch

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Score finished images.

        Args:
            images: uint8 RGB (B, 3, H, W).

        Raises:
            RewardError: the images are of another type or shape.
            NonFiniteScoreError: a score is not finite; it is never replaced by a number.
            OutOfMemoryError: not even one image fits.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            # Floating-point images would be divided by 255 although they lie in [0, 1] already.
            raise RewardError(
                f"reward `{self.name}` scores uint8 RGB images of shape (B, 3, H, W), found {images.dtype} of shape "
                f"{tuple(images.shape)}"
            )

        def run(start: int, stop: int) -> list[float]:
            # In place on the copy that another type always is, so the caller's images stay as they are.
            chunk = images[start:stop].to(self._device, torch.float32).div_(255)
            return self._finite(self._metric(chunk, prompts[start:stop]), chunk)

        self._require_prompts(len(images), prompts)
        return [number for part in self._chunks(run, len(images)) for number in part]

    @torch.enable_grad()
    def value_and_grad(self, sent: WireTensor, prompts: Sequence[str]) -> ScoredGradient:
        """Score x0-hat (latent cut) or unclipped pixels (image cut), and differentiate the raw score.

        Args:
            sent: x0-hat (B, C, h, w), or pixels around [0, 1] (B, 3, H, W).

        Returns:
            Scores, and the gradient of each with respect to its own entry of `sent`.

        Raises:
            RewardError: what was sent is of another shape, or a score or gradient is not finite.
            NonFiniteScoreError: and that is not the fault of what was sent.
            OutOfMemoryError: not even one image fits.
        """
        decoder = self._decoder if self._cut == "latent" else None
        if self._cut == "latent" and decoder is None:
            raise RewardError(f"reward `{self.name}` was started without a decoder, so it cannot take latents")

        # A plug-in's decoder need not say what it takes.
        channels = 3 if decoder is None else getattr(decoder, "channels", None)
        if sent.data.ndim != 4 or (channels is not None and sent.data.shape[1] != channels):
            what = "pixels" if decoder is None else "x0-hat"
            raise RewardError(
                f"reward `{self.name}` differentiates at {what} of shape (B, {channels or 'C'}, H, W) "
                f"(rewards.cut={self._cut}), found {tuple(sent.data.shape)}"
            )

        def run(start: int, stop: int) -> tuple[list[float], Tensor]:
            values = unpack(sent.rows(start, stop)).to(self._device).requires_grad_(True)
            pixels = decoder.decode(values) if decoder is not None else values
            # The score will be raised (lowered where lower is better): at the gamut's border only inward moves pass.
            scores = self._metric(clip_pixels(pixels, ascend=self._ascend), prompts[start:stop])
            (gradient,) = torch.autograd.grad(scores.sum(), values)
            numbers = self._finite(scores, values)
            if not torch.isfinite(gradient).all():
                raise NonFiniteScoreError(f"reward `{self.name}`: the gradient is not finite")
            return numbers, gradient

        self._require_prompts(len(sent.data), prompts)
        parts = self._chunks(run, len(sent.data))
        return ScoredGradient(
            [number for numbers, _ in parts for number in numbers],
            pack(torch.cat([gradient for _, gradient in parts]), self._wire_dtype),
        )

    def _require_prompts(self, count: int, prompts: Sequence[str]) -> None:
        if count == 0 or count != len(prompts):
            raise RewardError(
                f"reward `{self.name}` needs at least one image and one prompt per image (an empty one where it "
                f"reads none), found {count} images and {len(prompts)} prompts"
            )

    def _chunks(self, run: Callable[[int, int], Part], count: int) -> list[Part]:
        starts = range(0, count, self._max_batch)
        return [
            part
            for start in starts
            for part in in_halves(run, start, min(start + self._max_batch, count), name=self.name)
        ]

    def _finite(self, scores: Tensor, asked: Tensor) -> list[float]:
        numbers = scores.detach().float().cpu()
        bad = int((~torch.isfinite(numbers)).sum())
        if bad:
            # An image that is not finite itself says nothing about the metric.
            kind = NonFiniteScoreError if bool(torch.isfinite(asked).all()) else RewardError
            raise kind(f"reward `{self.name}`: {bad} of {len(numbers)} scores are not finite")
        return numbers.tolist()
