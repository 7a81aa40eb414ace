"""Combine raw scores and gradients of the pool into one normalised quality and its gradient at x0-hat."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

import torch
from torch import Tensor

from acpo_dist.algorithms.base import RewardSignal
from acpo_dist.core.errors import NonFiniteError, RewardConfigError
from acpo_dist.core.types import RewardTerm
from acpo_dist.objective.composition import compose, composition_slopes
from acpo_dist.workers.reward.wire import WireTensor, pack, unpack
from acpo_dist.workers.reward.worker import ScoredGradient


class GradientSource(Protocol):
    """The reward pool as the learner sees it."""

    def submit(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> Future[ScoredGradient]:
        """Request scores and their gradient at `sent`; a pool in this process computes them before it returns.

        Args:
            metric: name of a training reward.
            sent: x0-hat (B, C, h, w), or pixels (B, 3, H, W), by the cut.
            prompts: one per sample.

        Returns:
            Future of the response; its `result` raises `RewardError` if there was none within the deadline.
        """
        ...


class PooledReward:
    """Composes several metrics, each normalised and hinged, into one quality q and its gradient dq / d x0-hat."""

    def __init__(
        self,
        source: GradientSource,
        terms: Sequence[RewardTerm],
        decode: Callable[[Tensor], Tensor],
        *,
        cut: str,
        wire_dtype: str,
        spread: float = 0.0,
        crop: int | None = None,
        seed: int = 0,
        skippable: bool = False,
    ) -> None:
        """Store the pool and the settings of the composition.

        Args:
            source: the pool.
            terms: rewards with weights and normalisers.
            decode: x_0 -> pixels; used by the image cut.
            cut: `latent` or `image`.
            wire_dtype: precision of tensors sent to the pool.
            spread: c of the composition (`compose`).
            crop: side, in elements of x0-hat, of the window that is scored; None scores the whole.
            seed: seed of the window positions.
            skippable: return a NaN signal for a non-finite x0-hat, so that all ranks skip the step; otherwise raise.
        """
        self._source, self._terms, self._decode, self._skippable = source, terms, decode, skippable
        self._cut, self._wire_dtype, self._spread = cut, wire_dtype, spread
        self._crop, self._generator = crop, torch.Generator().manual_seed(seed)
        self.waited_s = 0.0
        """Seconds that the learner spent waiting for the pool."""

    def __call__(self, clean_estimate: Tensor, prompts: Sequence[str]) -> Callable[[], RewardSignal]:
        """Request the gradient (`RewardGradient`); metrics in this process are computed immediately."""
        whole = clean_estimate.detach()
        rows, columns = self._window(*whole.shape[2:])
        clean = whole[..., rows, columns]
        if self._cut == "latent":
            sent = clean
        else:
            # Exact in both cases: the chain rule through the own decoder replaces the worker's.
            clean = clean.clone().requires_grad_(True)
            with torch.enable_grad():
                sent = self._decode(clean)
        good_B = torch.isfinite(sent).flatten(1).all(1)
        if not good_B.all() and self._skippable:
            skipped = self._not_finite(whole, good_B)
            return lambda: skipped
        if not good_B.all():
            raise NonFiniteError(
                "the policy's own x0-hat is not finite; the step is skipped, and no weights leave the learner"
            )
        started = time.monotonic()
        wire = pack(sent, self._wire_dtype)
        futures = [self._source.submit(term.name, wire, prompts) for term in self._terms]
        self.waited_s += time.monotonic() - started

        def answer() -> RewardSignal:
            started = time.monotonic()
            answers = [future.result() for future in futures]
            self.waited_s += time.monotonic() - started
            gradient = self._compose_gradient(answers, sent, clean)
            placed = torch.zeros_like(whole, dtype=gradient.dtype)
            # Only the window was scored.
            placed[..., rows, columns] = gradient
            return self._signal(answers, placed)

        return answer

    def _compose_gradient(self, answers: Sequence[ScoredGradient], sent: Tensor, clean: Tensor) -> Tensor:
        """dq / d x0-hat within the window."""
        # The slope of one reward depends on the scores of all, so scores come first.
        weights = [term.weight for term in self._terms]
        slopes = composition_slopes(torch.tensor(self._rewards(answers)), weights, self._spread)
        gradient = torch.zeros(sent.shape)
        for term, answer, slope_B in zip(self._terms, answers, slopes, strict=True):
            slope_B = slope_B * torch.tensor([term.normaliser.slope(score) for score in answer.scores])
            gradient += slope_B.reshape(-1, *[1] * (sent.ndim - 1)) * unpack(answer.gradient)
        gradient = gradient.to(clean.device)
        if self._cut == "image":
            (gradient,) = torch.autograd.grad(sent, clean, gradient)
        return gradient

    def _rewards(self, answers: Sequence[ScoredGradient]) -> list[list[float]]:
        """Return normalised scores, capped at their ceilings: one row per term."""
        return [
            [term.normaliser.reward(score) for score in answer.scores]
            for term, answer in zip(self._terms, answers, strict=True)
        ]

    def _signal(self, answers: Sequence[ScoredGradient], gradient: Tensor) -> RewardSignal:
        weights = [term.weight for term in self._terms]
        quality = [compose(row, weights, self._spread) for row in zip(*self._rewards(answers), strict=True)]
        return RewardSignal(
            quality_B=torch.tensor(quality).to(gradient.device),
            gradient=gradient,
            target=compose([term.normaliser.target or 0.0 for term in self._terms], weights, self._spread),
            per_metric={
                f"reward/{term.name}/x0_hat": torch.tensor(answer.scores)
                for term, answer in zip(self._terms, answers, strict=True)
            },
        )

    @staticmethod
    def _not_finite(whole: Tensor, good_B: Tensor) -> RewardSignal:
        """Return a NaN signal for non-finite x0 estimates; the pool is not queried."""
        quality_B = torch.where(good_B, 0.0, torch.nan)
        gradient = torch.zeros_like(whole) + quality_B.reshape(-1, *[1] * (whole.ndim - 1)).to(whole)
        return RewardSignal(quality_B=quality_B, gradient=gradient, target=0.0, per_metric={})

    def _window(self, height: int, width: int) -> tuple[slice, slice]:
        """Return the scored rows and columns, the same for a micro-batch and uniform over all positions.

        Raises:
            RewardConfigError: the window is larger than x0-hat.
        """

        def along(length: int) -> slice:
            side = self._crop or length
            if side > length:
                raise RewardConfigError(
                    f"rewards.latent_crop is {side}, and x0-hat has {height} x {width} elements: reduce it, or "
                    "remove it."
                )
            start = int(torch.randint(length - side + 1, (), generator=self._generator))
            return slice(start, start + side)

        return along(height), along(width)
