"""Train a no-reference quality network on graded damage: the label is one minus the severity."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from scipy.stats import spearmanr
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LabelledBatch = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""(count, generator) -> (pictures (B, 3, H, W) in [0, 1], severities (B,))."""


@dataclass(frozen=True, kw_only=True)
class IqaReport:
    """How well the network ranks damage that it did not see in training."""

    srcc: float
    mean_absolute_error: float
    seconds: float


def train_iqa(
    network: nn.Module, draw: LabelledBatch, *, steps: int, batch_size: int, seed: int, learning_rate: float = 1e-3,
    held_out: LabelledBatch | None = None,
) -> IqaReport:  # fmt: skip
    """Train in place with L1 plus a tenth of a pairwise ranking loss; report on 1,000 fresh pictures.

    Args:
        draw: training pictures.
        held_out: pictures to report on, from references that `draw` never gives; None draws fresh damage.

    Source: TwoStream-IQA's training (L1 on the label, Adam 1e-3), with a hinge on pairs for the order.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
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
        if step % 200 == 0:
            logger.info("iqa step %d of %d: loss %.4f", step, steps, loss.item())
    report = measure_iqa(network, held_out or draw, seed=seed + 1_000_003)
    return IqaReport(
        srcc=report.srcc, mean_absolute_error=report.mean_absolute_error, seconds=time.monotonic() - started
    )


@torch.no_grad()
def measure_iqa(network: nn.Module, draw: LabelledBatch, *, seed: int, count: int = 1000) -> IqaReport:
    """Rank correlation and error on `count` pictures drawn with a seed that training never used."""
    network.eval()
    images, severity = draw(count, torch.Generator().manual_seed(seed))
    score = torch.cat([network(chunk) for chunk in images.split(100)])
    srcc = float(spearmanr(score.numpy(), (1 - severity).numpy()).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    return IqaReport(srcc=srcc, mean_absolute_error=float((score - (1 - severity)).abs().mean()), seconds=0.0)


def _ranking_loss(score: Tensor, target: Tensor) -> Tensor:
    """Hinge on half of the label gap over the pairs (i, i + 1)."""
    gap = target - target.roll(1)
    return F.relu(0.5 * gap.abs() - gap.sign() * (score - score.roll(1))).mean()
