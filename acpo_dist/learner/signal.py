"""From raw scores and gradients of the pool to one normalised quality and its gradient at x0-hat."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from acpo_dist.algorithms.base import RewardSignal
from acpo_dist.core.errors import NonFiniteError
from acpo_dist.core.types import RewardTerm
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
    """Sums several metrics: q = sum_k w_k sign_k (score_k - mean_k) / std_k, and dq / d x0-hat."""

    def __init__(
        self,
        source: GradientSource,
        terms: Sequence[RewardTerm],
        decode: Callable[[Tensor], Tensor],
        *,
        cut: str,
        wire_dtype: str,
    ) -> None:
        """Take the pool, the terms and, for the image cut, the decoder."""
        self._source, self._terms, self._decode = source, terms, decode
        self._cut, self._wire_dtype = cut, wire_dtype

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
        quality = torch.zeros(len(prompts))
        gradient = torch.zeros(sent.shape)
        per_metric = {}
        for term in self._terms:
            answer = self._source.value_and_grad(term.name, wire, prompts)
            normaliser = term.normaliser
            scores = torch.tensor(answer.scores)
            quality += term.weight * torch.tensor([normaliser.normalise(score) for score in answer.scores])
            gradient += term.weight * normaliser.sign / normaliser.std * unpack(answer.gradient)
            per_metric[f"reward/{term.name}/x0_hat"] = scores
        gradient = gradient.to(clean.device)
        if self._cut == "image":
            (gradient,) = torch.autograd.grad(sent, clean, gradient)
        target = sum(term.weight * (term.normaliser.target or 0.0) for term in self._terms)
        return RewardSignal(quality_B=quality.to(clean.device), gradient=gradient, target=target, per_metric=per_metric)
