"""From raw scores and gradients of the pool to one normalised quality and its gradient at x0-hat."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from acpo_dist.algorithms.base import RewardSignal
from acpo_dist.core.errors import NonFiniteError
from acpo_dist.core.types import RewardTerm
from acpo_dist.objective.composition import compose, composition_slopes
from acpo_dist.rewards.wire import WireTensor, pack, unpack
from acpo_dist.rewards.worker import ScoredGradient


class GradientSource(Protocol):
    """The reward pool as the learner sees it."""

    def value_and_grad(self, metric: str, sent: WireTensor, prompts: Sequence[str]) -> ScoredGradient:
        """Scores and gradient at `sent`.

        Raises:
            RewardError: not to be had within the deadline.
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
    ) -> None:
        """Take the pool, the terms, for the image cut the decoder, and c of the composition (`compose`)."""
        self._source, self._terms, self._decode = source, terms, decode
        self._cut, self._wire_dtype, self._spread = cut, wire_dtype, spread
        self.waited_s = 0.0
        """Seconds in which the learner had nothing to do but wait for the pool."""

    def __call__(self, clean_estimate: Tensor, prompts: Sequence[str]) -> RewardSignal:
        """See `RewardGradient`."""
        clean = clean_estimate.detach()
        if self._cut == "latent":
            sent = clean
        else:
            # Exact either way: the chain rule through our own decoder replaces the worker's.
            clean = clean.clone().requires_grad_(True)
            with torch.enable_grad():
                sent = self._decode(clean)
        if not torch.isfinite(sent).all():
            raise NonFiniteError(
                "the policy's own x0-hat is not finite; the step is refused and no weight leaves the learner"
            )
        wire = pack(sent, self._wire_dtype)
        weights = [term.weight for term in self._terms]
        # What the spread's gradient takes of one reward depends on the scores of all, so they all come first.
        started = time.monotonic()
        answers = [self._source.value_and_grad(term.name, wire, prompts) for term in self._terms]
        self.waited_s += time.monotonic() - started
        rewards = [
            [term.normaliser.reward(score) for score in answer.scores]
            for term, answer in zip(self._terms, answers, strict=True)
        ]
        slopes = composition_slopes(torch.tensor(rewards), weights, self._spread)
        gradient = torch.zeros(sent.shape)
        for term, answer, slope_B in zip(self._terms, answers, slopes, strict=True):
            slope_B = slope_B * torch.tensor([term.normaliser.slope(score) for score in answer.scores])
            gradient += slope_B.reshape(-1, *[1] * (sent.ndim - 1)) * unpack(answer.gradient)
        gradient = gradient.to(clean.device)
        if self._cut == "image":
            (gradient,) = torch.autograd.grad(sent, clean, gradient)
        return RewardSignal(
            quality_B=torch.tensor([compose(row, weights, self._spread) for row in zip(*rewards, strict=True)]).to(
                clean.device
            ),
            gradient=gradient,
            target=compose([term.normaliser.target or 0.0 for term in self._terms], weights, self._spread),
            per_metric={
                f"reward/{term.name}/x0_hat": torch.tensor(answer.scores)
                for term, answer in zip(self._terms, answers, strict=True)
            },
        )
