"""Preference losses on pairs of samples, whatever their errors were measured on: noise or NCP features.

Conventions, for every kind:

* Errors are means over elements (not sums). With D elements, the beta of the sum convention is beta / D.
* The logit carries a factor 1/2 and beta absorbs the number of timesteps and their weight, as in Diffusion-DPO, whose
  launchers use beta = 5000. Code that leaves the 1/2 out (NCP's beta_dpo = 2500) means the same with half the number.
* For v-prediction the errors are those in noise units (`noise_statistics`), so beta keeps its meaning.
* Winner and loser share timestep, noise and, for NCP, the noise of the reverse step.
* Nothing is averaged over pairs here: the caller divides by the global count.
"""

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from acpo_dist.objective.noise_space import ErrorStatistics

KINDS = ("dpo", "ipo", "hinge", "cpo", "sft")


@dataclass(frozen=True, kw_only=True)
class PreferenceTerm:
    """P pairs."""

    loss_P: Tensor
    """With the policy's gradient."""
    logit_P: Tensor
    """What the loss saw, detached; its share above 0 is the implicit accuracy. For `sft` the logit of `dpo`."""


def split_pairs(statistics: ErrorStatistics) -> tuple[ErrorStatistics, ErrorStatistics]:
    """(winners, losers) of a batch that holds P winners and then their P losers in the same order.

    Raises:
        ValueError: an odd number of samples.
    """
    count = len(statistics.cross_B)
    if count % 2:
        raise ValueError(f"pairs need an even number of samples, found {count}")
    return statistics.rows(slice(None, count // 2)), statistics.rows(slice(count // 2, None))


def preference_logit(winner_P: Tensor, loser_P: Tensor, beta: float) -> Tensor:
    """-(beta / 2) (winner - loser): above 0 when the policy explains the winner better.

    Args:
        winner_P: excess over the reference's error (DPO, IPO, hinge), or the policy's own error (CPO).
        loser_P: the same of the losers.
        beta: see the module's conventions.
    """
    return -beta / 2 * (winner_P - loser_P)


def dpo_loss(logit_P: Tensor) -> Tensor:
    """-log sigmoid(logit); log 2 where the policy is still the reference.

    Source: Diffusion-DPO (Wallace et al. 2023), with the constants of its public code.
    """
    return F.softplus(-logit_P)


def ipo_loss(logit_P: Tensor) -> Tensor:
    """(logit - 1/2)^2.

    That is beta^2 (h - 1 / (2 beta))^2 of the published form, with h = logit / beta: the same minimiser, but the unit
    of all other losses here, so a learning rate carries over between kinds.

    Source: Azar et al. 2023.
    """
    return (logit_P - 0.5).square()


def hinge_loss(logit_P: Tensor) -> Tensor:
    """max(1 - logit, 0): no pull once the margin is reached. Source: SLiC-HF (Zhao et al. 2023)."""
    return F.relu(1 - logit_P)


def preference_term(
    kind: str, winner: ErrorStatistics, loser: ErrorStatistics, *, beta: float, sft_weight: float = 0.0
) -> PreferenceTerm:
    """One preference loss per pair.

    Args:
        kind: `dpo`, `ipo`, `hinge`: on the excess over the reference. `cpo`: -log sigmoid of the policy's own errors,
            no reference in it, plus `sft_weight` times the winner's error (the paper's form; at 0 the loss can fall by
            making losers worse alone). `sft`: the winner's error alone.
        winner: statistics of the P winners.
        loser: statistics of the P losers, in the same order.
        beta: see the module's conventions; not used by the value of `sft`.
        sft_weight: lambda of `cpo`, no part of the others.

    Raises:
        ValueError: unknown kind.

    Source: Diffusion-DPO; NCP (IEEE Access 13:193745) for CPO's winner term; CPO: Xu et al. 2024.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown preference loss {kind!r}; known: {', '.join(KINDS)}")
    if kind == "cpo":
        logit = preference_logit(winner.policy_error, loser.policy_error, beta)
        return PreferenceTerm(loss_P=dpo_loss(logit) + sft_weight * winner.policy_error, logit_P=logit.detach())
    logit = preference_logit(winner.excess, loser.excess, beta)
    if kind == "sft":
        return PreferenceTerm(loss_P=winner.policy_error, logit_P=logit.detach())
    loss = {"dpo": dpo_loss, "ipo": ipo_loss, "hinge": hinge_loss}[kind]
    return PreferenceTerm(loss_P=loss(logit), logit_P=logit.detach())
