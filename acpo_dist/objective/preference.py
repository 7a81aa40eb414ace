"""Preference losses on pairs of samples, for errors of noise or of NCP features.

Conventions for all losses:

* Errors are means over elements (not sums). With D elements, the beta of the sum convention is beta / D.
* The logit carries a factor 1/2 and beta absorbs the number of timesteps and their weight, as in Diffusion-DPO, whose
  launchers use beta = 5000. Code without the factor 1/2 (NCP's beta_dpo = 2500) is equivalent with half the number.
* For v-prediction the errors are in noise units (`noise_statistics`), so beta keeps its meaning.
* Winner and loser share timestep, noise and, for NCP, the noise of the reverse step.
* Losses are per pair; the caller divides by the global count.
"""

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from acpo_dist.objective.noise_space import ErrorStatistics

KINDS = ("dpo", "ipo", "hinge", "cpo", "sft")


@dataclass(frozen=True, kw_only=True)
class PreferenceTerm:
    """Loss and logit of P pairs."""

    loss_P: Tensor
    """Loss per pair, with the graph."""
    logit_P: Tensor
    """Logit per pair, detached; the share above 0 is the implicit accuracy. For `sft` the logit of `dpo`."""


def split_pairs(statistics: ErrorStatistics) -> tuple[ErrorStatistics, ErrorStatistics]:
    """Split a batch of P winners followed by their P losers, in the same order, into (winners, losers).

    Raises:
        ValueError: the number of samples is odd.
    """
    count = len(statistics.cross_B)
    if count % 2:
        raise ValueError(f"pairs need an even number of samples, found {count}")
    return statistics.rows(slice(None, count // 2)), statistics.rows(slice(count // 2, None))


def preference_logit(winner_P: Tensor, loser_P: Tensor, beta: float) -> Tensor:
    """Return -(beta / 2) (winner - loser), which is above 0 if the policy predicts the winner better.

    Args:
        winner_P: excess over the reference error (DPO, IPO, hinge), or the policy's own error (CPO), of the winners.
        loser_P: the same for the losers.
        beta: strength of the preference, in the convention of this module.
    """
    return -beta / 2 * (winner_P - loser_P)


def dpo_loss(logit_P: Tensor) -> Tensor:
    """Return -log sigmoid(logit); log 2 if the policy equals the reference.

    Source: Diffusion-DPO (Wallace et al. 2023), with the constants of its public code.
    """
    return F.softplus(-logit_P)


def ipo_loss(logit_P: Tensor) -> Tensor:
    """Return (logit - 1/2)^2.

    This is beta^2 (h - 1 / (2 beta))^2 of the published form, with h = logit / beta. It has the same minimiser and the
    unit of the other losses, so that learning rates are comparable.

    Source: Azar et al. 2023.
    """
    return (logit_P - 0.5).square()


def hinge_loss(logit_P: Tensor) -> Tensor:
    """Return max(1 - logit, 0), which has no gradient beyond the margin. Source: SLiC-HF (Zhao et al. 2023)."""
    return F.relu(1 - logit_P)


def preference_term(
    kind: str, winner: ErrorStatistics, loser: ErrorStatistics, *, beta: float, sft_weight: float = 0.0
) -> PreferenceTerm:
    """Return one preference loss per pair.

    Args:
        kind: `dpo`, `ipo`, `hinge`: on the excess over the reference. `cpo`: -log sigmoid of the policy's own errors,
            without a reference, plus `sft_weight` times the winner's error (the paper's form; at 0 the loss can fall
            solely by worsening losers). `sft`: the winner's error only.
        winner: statistics of the P winners.
        loser: statistics of the P losers, in the same order.
        beta: strength of the preference, in the convention of this module; does not affect the value of `sft`.
        sft_weight: lambda of `cpo`; ignored by the other kinds.

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
