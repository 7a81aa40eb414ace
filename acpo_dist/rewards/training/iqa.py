"""Train a no-reference quality network on graded damage; the label is one minus the severity."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LabelledBatch = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""(count, generator) -> (images (B, 3, H, W) in [0, 1], severities (B,))."""


@dataclass(frozen=True, kw_only=True)
class IqaReport:
    """Agreement of the network with damage not seen in training."""

    srcc: float
    plcc: float
    mean_absolute_error: float
    seconds: float


def train_iqa(
    network: nn.Module, draw: LabelledBatch, *, steps: int, batch_size: int, seed: int, learning_rate: float = 1e-3,
    held_out: LabelledBatch | None = None,
) -> IqaReport:  # fmt: skip
    """Train in place with L1 plus a tenth of a pairwise ranking loss, and report on 1,000 new images.

    Args:
        network: network to train.
        draw: source of training images.
        steps: number of optimiser steps.
        batch_size: images per step.
        seed: seed of the training images.
        learning_rate: learning rate.
        held_out: source of report images, with references that `draw` never uses; None uses new damage from `draw`.

    Returns:
        The report.

    Source: TwoStream-IQA's training (L1 on the label, Adam 1e-3), with an additional hinge on pairs for the order.
    """
    started = time.monotonic()
    fit_iqa(network, draw, steps=steps, batch_size=batch_size, seed=seed, learning_rate=learning_rate)
    report = measure_iqa(network, held_out or draw, seed=seed + 1_000_003)
    return replace(report, seconds=time.monotonic() - started)


def fit_iqa(
    network: nn.Module, draw: LabelledBatch, *, steps: int, batch_size: int, seed: int, learning_rate: float = 1e-3,
    progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Train as `train_iqa` does, without a report.

    Args:
        network: network to train.
        draw: source of training images.
        steps: number of optimiser steps.
        batch_size: images per step.
        seed: seed of the training images.
        learning_rate: learning rate.
        progress: called with 1 after every step.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    network.train()
    for step in range(steps):
        images, severity = draw(batch_size, generator)
        target = 1 - severity
        score = network(images)
        loss = F.l1_loss(score, target) + 0.1 * _ranking_loss(score, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        if progress:
            progress(1)
        if step % 200 == 0:
            logger.info("iqa step %d of %d: loss %.4f", step, steps, loss.item())
    network.eval()


@torch.no_grad()
def measure_iqa(network: nn.Module, draw: LabelledBatch, *, seed: int, count: int = 1000) -> IqaReport:
    """Measure rank correlation and error on `count` images, drawn with a seed that training never uses."""
    network.eval()
    images, severity = draw(count, torch.Generator().manual_seed(seed))
    score = torch.cat([network(chunk) for chunk in images.split(100)])
    return agreement(score, 1 - severity)


def agreement(score: Tensor, label: Tensor) -> IqaReport:
    """Compute rank and linear correlation and error of scores (N,) against labels (N,), without a duration."""
    srcc: Any = spearmanr(score.numpy(), label.numpy())
    plcc: Any = pearsonr(score.numpy(), label.numpy())
    return IqaReport(
        srcc=float(srcc.statistic), plcc=float(plcc.statistic),
        mean_absolute_error=float((score - label).abs().mean()), seconds=0.0,
    )  # fmt: skip


def _ranking_loss(score: Tensor, target: Tensor) -> Tensor:
    """Hinge loss with half of the label gap as margin, over the pairs (i, i + 1)."""
    gap = target - target.roll(1)
    return F.relu(0.5 * gap.abs() - gap.sign() * (score - score.roll(1))).mean()
