"""The reward worker: scores of finished samples, and gradients of scores at x0-hat or at an image. Stateless."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from acpo_dist.core.errors import AcpoError, RewardConfigError, RewardError
from acpo_dist.core.memory import is_out_of_memory
from acpo_dist.core.registry import MODELS, REWARDS, resolve
from acpo_dist.objective.perceptual import clip_pixels
from acpo_dist.workers.reward.memory import in_halves
from acpo_dist.workers.reward.wire import WireTensor, pack, unpack

Part = TypeVar("Part")

CHUNK = 16
"""Default of the largest number of images per forward pass."""


class NonFiniteScoreError(RewardError):
    """The metric returned a score or a gradient for finite images that is not finite."""


@dataclass(frozen=True)
class ScoredGradient:
    """Raw scores (B,) and their gradient with respect to the tensor that was sent."""

    scores: list[float]
    gradient: WireTensor

    def rows(self, start: int, stop: int) -> "ScoredGradient":
        """Return scores and gradients from `start` to before `stop`."""
        return ScoredGradient(self.scores[start:stop], self.gradient.rows(start, stop))


class RewardWorker:
    """One metric and, for the latent cut, a copy of the decoder."""

    def __init__(
        self, metric: Any, *, model: Any | None, cut: str, wire_dtype: str, device: str = "cpu", max_batch: int = CHUNK
    ) -> None:
        """Load the metric and, for the latent cut, the decoder.

        Args:
            metric: the metric's configuration section.
            model: the model's section, for the decoder of the latent cut; None for scores only.
            cut: `latent` or `image`.
            wire_dtype: `float16` or `float32`, of returned gradients.
            device: torch device of metric and decoder.
            max_batch: largest number of images per forward pass; fewer are used if memory runs out.

        Raises:
            RewardConfigError: the metric cannot be built, or it scores latents and there is no model, or another one
                than it was made for.
        """
        self.name = metric.name
        self.on_latents: bool = metric.space == "latent"
        """Whether finished samples are scored by their x_0 instead of their images."""
        if self.on_latents and model is None:
            raise RewardConfigError(
                f"reward `{self.name}` ({metric.type}) scores latents during a run and cannot score finished images: "
                "name the metric that it estimates."
            )
        self._metric = self._build(resolve("reward", REWARDS, metric.type), metric, device)
        self._ascend = metric.direction > 0
        decoder = resolve("model", MODELS, model.type).load_decoder(model, device=device) if model is not None else None
        if self.on_latents:
            self._metric.check_decoder(decoder)
            # Needed for the check only.
            decoder = None
        self._decoder = decoder
        self._cut, self._wire_dtype, self._device = cut, wire_dtype, device
        self._max_batch = max_batch

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of x_0 that a metric on latents scores."""
        return self._metric.latent_shape

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Score finished samples.

        Args:
            images: uint8 RGB (B, 3, H, W), or for a metric on latents their x_0, float32 (B, C, h, w).

        Raises:
            RewardError: the images are of another type or shape.
            NonFiniteScoreError: a score of a finite image is not finite; it is never replaced by a number.
            OutOfMemoryError: a single image does not fit.
        """
        if self.on_latents:
            return self._score_latents(images, prompts)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            # Floating-point images would be divided by 255 although they are already in [0, 1].
            raise RewardError(
                f"reward `{self.name}` scores uint8 RGB images of shape (B, 3, H, W), found {images.dtype} of shape "
                f"{tuple(images.shape)}"
            )

        def run(start: int, stop: int) -> list[float]:
            # In place on the copy that the type conversion makes, so the caller's images do not change.
            chunk = images[start:stop].to(self._device, torch.float32).div_(255)
            return self._finite(self._compute(chunk, prompts[start:stop]), chunk)

        self._require_prompts(len(images), prompts)
        return [number for part in self._chunks(run, len(images)) for number in part]

    def _score_latents(self, clean: Tensor, prompts: Sequence[str]) -> list[float]:
        if not clean.is_floating_point():
            raise RewardError(
                f"reward `{self.name}` scores latents (x_0, floating point), found {clean.dtype} of shape "
                f"{tuple(clean.shape)}; score images with the metric that it estimates"
            )

        def run(start: int, stop: int) -> list[float]:
            chunk = clean[start:stop].to(self._device, torch.float32)
            return self._finite(self._compute(chunk, prompts[start:stop]), chunk)

        self._require_prompts(len(clean), prompts)
        return [number for part in self._chunks(run, len(clean)) for number in part]

    @torch.enable_grad()
    def value_and_grad(self, sent: WireTensor, prompts: Sequence[str]) -> ScoredGradient:
        """Score x0-hat (latent cut) or unclipped pixels (image cut), and differentiate the raw score.

        Args:
            sent: x0-hat (B, C, h, w), or pixels around [0, 1] (B, 3, H, W).

        Returns:
            Scores, and the gradient of each with respect to its own entry of `sent`.

        Raises:
            RewardError: `sent` has another shape or is not finite, or the metric fails.
            NonFiniteScoreError: a score or gradient of finite values is not finite.
            OutOfMemoryError: a single image does not fit.
        """
        decoder = self._decoder if self._cut == "latent" else None
        if self._cut == "latent" and decoder is None and not self.on_latents:
            raise RewardError(f"reward `{self.name}` was started without a decoder, so it cannot score latents")

        # A plug-in's decoder may lack `channels`.
        channels = 3 if decoder is None else getattr(decoder, "channels", None)
        if self.on_latents:
            channels = self.latent_shape[0]
        if sent.data.ndim != 4 or (channels is not None and sent.data.shape[1] != channels):
            what = "pixels" if decoder is None and not self.on_latents else "x0-hat"
            raise RewardError(
                f"reward `{self.name}` differentiates at {what} of shape (B, {channels or 'C'}, H, W) "
                f"(rewards.cut={self._cut}), found {tuple(sent.data.shape)}"
            )

        def run(start: int, stop: int) -> tuple[list[float], Tensor]:
            values = unpack(sent.rows(start, stop)).to(self._device).requires_grad_(True)
            pixels = decoder.decode(values) if decoder is not None else values
            # At the border of the gamut only gradients whose update points inward pass.
            scored = values if self.on_latents else clip_pixels(pixels, ascend=self._ascend)
            scores = self._compute(scored, prompts[start:stop])
            gradient = self._differentiate(scores, values)
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

    def _build(self, kind: Any, metric: Any, device: str) -> Any:
        """Construct the metric, which may be a plug-in, whose own exceptions name neither reward nor key."""
        try:
            return kind(metric, device=device)
        except AcpoError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise RewardConfigError(
                f"reward `{self.name}` ({metric.type}) cannot be built: {_reason(error)}"
            ) from error

    def _compute(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) of the metric.

        Raises:
            RewardError: the metric raised an exception, or did not return floating-point scores (B,).
        """
        try:
            scores: Any = self._metric(images, prompts)
        except AcpoError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise RewardError(f"reward `{self.name}` raised {_reason(error)}") from error
        if isinstance(scores, Tensor):
            # Scores on another device than the images are taken, except on `meta`, where tensors have no values.
            if scores.shape == (len(images),) and scores.is_floating_point() and not scores.is_meta:
                return scores
            found = f"{scores.dtype} of shape {tuple(scores.shape)} on device {scores.device}"
        else:
            found = type(scores).__name__
        raise RewardError(
            f"reward `{self.name}` must return a floating-point tensor of shape ({len(images)},), one score per image; "
            f"found {found}. Correct the metric's `__call__`."
        )

    def _differentiate(self, scores: Tensor, values: Tensor) -> Tensor:
        """Return the gradient of each score with respect to its own entry of `values`."""
        if not scores.requires_grad:
            raise RewardError(
                f"reward `{self.name}` returned scores without a gradient: they are constant, or were computed under "
                "torch.no_grad, detached or converted. Correct the metric, or use it as a judge (rewards.judges)."
            )
        (gradient,) = torch.autograd.grad(scores.sum(), values, allow_unused=True)
        if gradient is None:
            raise RewardError(f"reward `{self.name}` returned scores that do not depend on the images")
        return gradient

    def _require_prompts(self, count: int, prompts: Sequence[str]) -> None:
        if count == 0 or count != len(prompts):
            raise RewardError(
                f"reward `{self.name}` needs at least one image and one prompt per image (empty if it reads none), "
                f"found {count} images and {len(prompts)} prompts"
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
            # If the image itself is not finite, the metric is not at fault.
            kind = NonFiniteScoreError if bool(torch.isfinite(asked).all()) else RewardError
            raise kind(f"reward `{self.name}`: {bad} of {len(numbers)} scores are not finite")
        return numbers.tolist()


def _reason(error: Exception) -> str:
    """Return type and last line of a plug-in's exception, and the line of code that raised it."""
    lines = str(error).strip().splitlines()
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}{': ' + lines[-1][:300] if lines else ''}{where}"
