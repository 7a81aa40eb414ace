"""The reward worker: scores pictures, and returns the gradient of a score at x0-hat or at a picture. Stateless."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acpo_dist.core.errors import RewardError
from acpo_dist.core.registry import MODELS, REWARDS, resolve
from acpo_dist.objective.perceptual import clip_pixels
from acpo_dist.rewards.wire import WireTensor, pack, unpack

CHUNK = 16
"""Pictures per forward: fixed, so that a score does not depend on who was asked together."""


@dataclass(frozen=True)
class ScoredGradient:
    """Raw scores (B,) and their gradient with respect to what was sent, at what was sent."""

    scores: list[float]
    gradient: WireTensor


class RewardWorker:
    """One metric with, for the latent cut, its own copy of the decoder."""

    def __init__(self, metric: Any, *, model: Any | None, cut: str, wire_dtype: str, device: str = "cpu") -> None:
        """Load the metric and, for the latent cut, the decoder.

        Args:
            metric: the metric's configuration section.
            model: the model's section; needed for the latent cut of a metric that gives gradients.
            cut: `latent` or `image`.
        """
        self.name = metric.name
        kind = resolve("reward", REWARDS, metric.type)
        self._metric = kind(metric, device=device)
        self._ascend = kind.direction(metric) > 0
        self._decoder = (
            resolve("model", MODELS, model.type).load_decoder(model, device=device) if model is not None else None
        )
        self._cut, self._wire_dtype, self._device = cut, wire_dtype, device

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Score finished pictures.

        Args:
            images: uint8 RGB (B, 3, H, W).

        Raises:
            RewardError: a score is not finite; it is never replaced by a number.
        """
        scores: list[float] = []
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK].to(self._device).float() / 255
            scores += self._finite(self._metric(chunk, prompts[start : start + CHUNK]))
        return scores

    @torch.enable_grad()
    def value_and_grad(self, sent: WireTensor, prompts: Sequence[str]) -> ScoredGradient:
        """Score x0-hat (latent cut) or unclipped pixels (image cut), and differentiate the raw score.

        Args:
            sent: x0-hat (B, C, h, w), or pixels around [0, 1] (B, 3, H, W).

        Returns:
            Scores, and the gradient of each with respect to its own entry of `sent`.

        Raises:
            RewardError: a score or gradient is not finite.
        """
        values = unpack(sent).to(self._device).requires_grad_(True)
        if self._cut == "latent":
            if self._decoder is None:
                raise RewardError(f"reward `{self.name}` was started without a decoder, so it cannot take latents")
            pixels = self._decoder.decode(values)
        else:
            pixels = values
        # The score will be raised (lowered where lower is better): at the gamut's border only inward moves may pass.
        scores = self._metric(clip_pixels(pixels, ascend=self._ascend), prompts)
        (gradient,) = torch.autograd.grad(scores.sum(), values)
        numbers = self._finite(scores)
        if not torch.isfinite(gradient).all():
            raise RewardError(f"reward `{self.name}`: the gradient is not finite")
        return ScoredGradient(numbers, pack(gradient, self._wire_dtype))

    def _finite(self, scores: Tensor) -> list[float]:
        numbers = scores.detach().float().cpu()
        bad = int((~torch.isfinite(numbers)).sum())
        if bad:
            raise RewardError(f"reward `{self.name}`: {bad} of {len(numbers)} scores are not finite")
        return numbers.tolist()
