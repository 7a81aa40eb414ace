"""Join requests of several callers into one batch, and split the result."""

from collections.abc import Sequence

import torch
from torch import Tensor

from acpo_dist.workers.reward.wire import WireTensor, join
from acpo_dist.workers.reward.worker import RewardWorker, ScoredGradient

ScoreRequest = tuple[Tensor, tuple[str, ...]]
"""uint8 images (B, 3, H, W), and one prompt per image."""
GradientRequest = tuple[WireTensor, tuple[str, ...]]
"""x0-hat or pixels, and one prompt per image."""


def score_together(worker: RewardWorker, requests: Sequence[ScoreRequest]) -> list[list[float]]:
    """Compute scores per request; all images have one size."""
    scores = worker.score(torch.cat([images for images, _ in requests]), _prompts(requests))
    return [scores[start:stop] for start, stop in _ranges([len(images) for images, _ in requests])]


def gradients_together(worker: RewardWorker, requests: Sequence[GradientRequest]) -> list[ScoredGradient]:
    """Compute scores and gradients per request; all tensors have one shape and type."""
    answer = worker.value_and_grad(join([sent for sent, _ in requests]), _prompts(requests))
    return [answer.rows(start, stop) for start, stop in _ranges([len(sent.data) for sent, _ in requests])]


def _prompts(requests: Sequence[ScoreRequest] | Sequence[GradientRequest]) -> tuple[str, ...]:
    return tuple(prompt for _, prompts in requests for prompt in prompts)


def _ranges(counts: Sequence[int]) -> list[tuple[int, int]]:
    stops = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
