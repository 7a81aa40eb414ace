"""Fit a latent critic to a metric's scores, and measure its error by timestep on held-out rollouts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from scipy.stats import spearmanr
from torch import Tensor

from acpo_dist.core.ports import Advance
from acpo_dist.rewards.latent_critic import CriticNetwork

FINAL = -1
"""Timestep of finished samples, x_0 itself."""
_BATCH = 256
"""States per forward pass when measuring."""

_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class LabelledLatents:
    """Estimates of x_0 of one size with the metric's scores."""

    clean: Tensor
    """x0-hat, float32 (N, C, h, w)."""
    scores: Tensor
    """The metric's scores of the decoded estimates, float32 (N,)."""
    gradients: Tensor | None
    """Their gradient with respect to `clean`; None for a metric without a usable gradient."""
    timesteps: Tensor
    """Timestep of each state, float32 (N,); `FINAL` for finished samples."""
    rollouts: Tensor
    """Number of the rollout of each state, int64 (N,)."""

    def rows(self, chosen: Tensor) -> "LabelledLatents":
        """Return the chosen states."""
        gradients = None if self.gradients is None else self.gradients[chosen]
        return LabelledLatents(
            clean=self.clean[chosen], scores=self.scores[chosen], gradients=gradients,
            timesteps=self.timesteps[chosen], rollouts=self.rollouts[chosen],
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """Training settings of a critic."""

    width: int = 32
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-3
    gradient_weight: float = 1.0
    """Weight of the gradient's squared error relative to that of the score, both in units of their variance."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class CriticError:
    """Agreement with the metric on held-out states; scores in the metric's unit."""

    timestep: float
    """`FINAL` for finished samples."""
    states: int
    mean: float
    """Mean score by the metric."""
    std: float
    """Standard deviation of the metric's scores: the error of a constant."""
    bias: float
    """Mean of critic minus metric."""
    rms_error: float
    srcc: float | None
    """Rank correlation; None if all scores are equal."""
    cosine: float | None
    """Mean cosine between the gradients of critic and metric; None without gradients."""


def split_rollouts(data: Sequence[LabelledLatents], held_out: float, seed: int) -> tuple[list[LabelledLatents], ...]:
    """Split states by rollout into (training data, held-out data), at least one rollout in each.

    Args:
        data: states by size.
        held_out: share of the rollouts in the second part.
        seed: seed of the choice.

    Raises:
        ValueError: fewer than two rollouts.
    """
    known = torch.cat([part.rollouts for part in data]).unique()
    if len(known) < 2:
        raise ValueError(f"a split needs at least two rollouts, found {len(known)}")
    order = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
    count = min(max(1, round(held_out * len(known))), len(known) - 1)
    chosen = order[:count]
    inside = [torch.isin(part.rollouts, chosen) for part in data]
    return (
        [part.rows(~mask) for part, mask in zip(data, inside, strict=True) if not mask.all()],
        [part.rows(mask) for part, mask in zip(data, inside, strict=True) if mask.any()],
    )


def fit_critic(
    network: CriticNetwork, data: Sequence[LabelledLatents], settings: CriticSettings, progress: Advance | None = None
) -> None:
    """Fit score and gradient to the metric's, in place.

    Args:
        network: random weights; its units are set here.
        data: training states by size; each batch holds one size.
        settings: training settings.
        progress: called with 1 after every step.

    Source: fitting derivatives beside values, Czarnecki et al. 2017 (Sobolev training).
    """
    scores = torch.cat([part.scores for part in data])
    # Channel statistics need one size; sizes of one model have nearly the same.
    network.standardise(max(data, key=lambda part: len(part.scores)).clean, scores)
    variance = float(network.scale[1]) ** 2
    slopes = [part.gradients for part in data if part.gradients is not None]
    power = float(torch.stack([g.flatten(1).square().sum(1).mean() for g in slopes]).mean()) if slopes else 0.0
    weight = settings.gradient_weight if power > 0 else 0.0
    sizes = torch.tensor([float(len(part.scores)) for part in data])
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=1e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    network.train()
    for _ in range(settings.steps):
        part = data[int(torch.multinomial(sizes, 1, generator=generator))]
        batch = part.rows(torch.randint(len(part.scores), (settings.batch_size,), generator=generator))
        clean = batch.clean.clone().requires_grad_(weight > 0)
        found = network(clean)
        loss = F.mse_loss(found, batch.scores) / variance
        if weight > 0:
            assert batch.gradients is not None, "either all states have gradients or none"
            (slope,) = torch.autograd.grad(found.sum(), clean, create_graph=True)
            loss = loss + weight * (slope - batch.gradients).flatten(1).square().sum(1).mean() / power
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        decay.step()
        if progress:
            progress(1)
    network.eval()


def measure_critic(network: CriticNetwork, data: Sequence[LabelledLatents]) -> list[CriticError]:
    """Measure the error at each timestep, the noisiest first and finished samples last."""
    timesteps = torch.cat([part.timesteps for part in data])
    scores = torch.cat([part.scores for part in data])
    answers = [_answers(network, part) for part in data]
    found = torch.cat([answer[0] for answer in answers])
    cosines = torch.cat([answer[1] for answer in answers])
    rows = []
    for timestep in sorted(timesteps.unique().tolist(), reverse=True):
        at = timesteps == timestep
        rows.append(_error(timestep, found[at], scores[at], cosines[at]))
    return rows


def seconds_per_state(network: CriticNetwork, clean: Tensor) -> float:
    """CPU seconds of this process for score and gradient of one state, in a batch of `clean` (B, C, h, w)."""
    values = clean.clone().requires_grad_(True)

    def run() -> None:
        torch.autograd.grad(network(values).sum(), values)

    # The first call sets up the kernels.
    run()
    started = time.process_time()
    for _ in range(_REPEATS):
        run()
    return (time.process_time() - started) / (_REPEATS * len(clean))


def _answers(network: CriticNetwork, part: LabelledLatents) -> tuple[Tensor, Tensor]:
    """Return the critic's scores (N,) and the cosines (N,) of its gradients; NaN without gradients."""
    scores, cosines = [], []
    for start in range(0, len(part.scores), _BATCH):
        clean = part.clean[start : start + _BATCH].clone().requires_grad_(True)
        found = network(clean)
        (slope,) = torch.autograd.grad(found.sum(), clean)
        scores.append(found.detach())
        if part.gradients is None:
            cosines.append(torch.full((len(clean),), torch.nan))
        else:
            wanted = part.gradients[start : start + _BATCH]
            cosines.append(F.cosine_similarity(slope.flatten(1), wanted.flatten(1), dim=1))
    return torch.cat(scores), torch.cat(cosines)


def _error(timestep: float, found: Tensor, scores: Tensor, cosines: Tensor) -> CriticError:
    varied = len(scores) > 1 and float(scores.std()) > 0 and float(found.std()) > 0
    srcc = float(spearmanr(found.numpy(), scores.numpy()).statistic) if varied else None  # pyright: ignore[reportAttributeAccessIssue]
    difference = found - scores
    return CriticError(
        timestep=timestep, states=len(scores), mean=float(scores.mean()), std=float(scores.std(correction=0)),
        bias=float(difference.mean()), rms_error=float(difference.square().mean().sqrt()), srcc=srcc,
        cosine=None if bool(cosines.isnan().all()) else float(cosines.mean()),
    )  # fmt: skip
