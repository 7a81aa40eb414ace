"""Preference learning on pairs: DPO (sigmoid, IPO, hinge), CPO and SFT, on noise or on the frozen U-Net's features.

Winner and loser are adjacent in a batch and share timestep, noise and the noise of NCP's reverse step.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor
from typing_extensions import override

from acpo_dist.algorithms.base import MicroBatch, Network
from acpo_dist.algorithms.config import CpoConfig, DpoConfig, PreferenceConfig, SftConfig
from acpo_dist.algorithms.denoising import NoiseSpaceAlgorithm, both_outputs, statistics_of
from acpo_dist.algorithms.grouping import flat_images
from acpo_dist.algorithms.noising import NoisedStates, noise_forward
from acpo_dist.core.seeding import derive_seed
from acpo_dist.core.types import ScoredGroups, Selection
from acpo_dist.diffusion.prediction import to_noise
from acpo_dist.objective.ncp import ncp_statistics, ncp_step
from acpo_dist.objective.noise_space import ErrorStatistics, min_snr_weight
from acpo_dist.objective.pairs import Verdict, nearly_same, pair_group
from acpo_dist.objective.preference import PreferenceTerm, preference_term

BETA = "beta"


class Preference(NoiseSpaceAlgorithm):
    """Base class with pair selection, errors and calibration; subclasses implement the loss of a pair."""

    config: PreferenceConfig

    def __init__(self, config: PreferenceConfig) -> None:
        """Store the configuration."""
        self.config = config

    @abstractmethod
    def term(self, winner: ErrorStatistics, loser: ErrorStatistics, beta: float) -> PreferenceTerm:
        """Return the loss of each pair.

        Args:
            winner: errors of the P winners.
            loser: errors of the P losers, in the same order.
            beta: strength of the preference; the configured value, or the calibrated value for NCP.
        """

    def select(self, scored: ScoredGroups) -> Selection:
        """Pair best with worst within each prompt; excluded pairs keep their position with weight 0."""
        settings = self.config.pairs
        flat = flat_images(scored) if settings.drop_constant else ()
        images = scored.images() if settings.duplicates > 0 else {}
        counts = dict.fromkeys(Verdict, 0)
        ids: list[str] = []
        weights: dict[str, float] = {}
        margins: list[float] = []
        for group in scored.groups:
            for pair in pair_group(
                [plan.sample_id for plan in group.samples], scored.qualities, scored.weights,
                spread=scored.spread, margin=settings.margin, absolute=settings.absolute, constant=flat,
                duplicate=(lambda a, b: nearly_same(images[a], images[b], settings.duplicates))
                if settings.duplicates > 0 else None,
            ):  # fmt: skip
                counts[pair.verdict] += 1
                kept = pair.verdict is Verdict.KEPT
                if kept:
                    margins.append(pair.margin)
                ids += [pair.winner, pair.loser]
                weights |= {pair.winner: float(kept), pair.loser: float(kept)}
        metrics = {f"pairs/{verdict.value}": float(count) for verdict, count in counts.items()}
        if margins:
            metrics["pairs/mean_margin"] = sum(margins) / len(margins)
        return Selection(sample_ids=tuple(ids), weights=weights, metrics=metrics)

    def objective(
        self, batch: MicroBatch, network: Network, states: NoisedStates, model_output: Tensor, base: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute one loss per pair, assigned to both of its samples."""
        errors = self._errors(batch, network, states, model_output, base)
        winner, loser = errors.rows(slice(0, None, 2)), errors.rows(slice(1, None, 2))
        beta = batch.constants.get(BETA, self.config.beta)
        term = self.term(winner, loser, beta)
        seen = (batch.weights_B[::2] > 0) & ~states.is_null_B[::2]
        metrics = {
            "preference/loss": term.loss_P.detach()[seen],
            "preference/logit": term.logit_P[seen],
            "preference/accuracy": (term.logit_P > 0).float()[seen],
            "preference/winner_error": winner.policy_error.detach()[seen],
            "preference/loser_error": loser.policy_error.detach()[seen],
        }
        # The batch mean is over samples; with the pair's loss on both samples it equals the mean over pairs.
        return batch.weights_B * term.loss_P.repeat_interleave(2), metrics

    def observe(self, batch: MicroBatch, network: Network) -> Mapping[str, Tensor]:
        """Return, for NCP, the error differences of pairs of samples on noise and on features, one value per pair."""
        if self.config.space != "ncp":
            return {}
        states = noise_forward(batch, network, lowest=1, t_max=self.config.t_max, drawing=self.config.timesteps)
        model_output, base = both_outputs(network, states)
        found = {
            "noise": statistics_of(batch, network, states, model_output, base),
            "feature": self._errors(batch, network, states, model_output, base),
        }
        # The number of base samples may be odd; the last one then has no partner and is dropped.
        paired = len(batch.sample_ids) // 2 * 2
        return {
            name: (errors.reference_error_B[:paired:2] - errors.reference_error_B[1:paired:2]).abs()
            for name, errors in found.items()
        }

    def calibrate(self, metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Return the beta for NCP distances that yields the logit scale of `beta` on noise errors of the base model.

        Raises:
            ValueError: a median is not positive and finite.
        """
        if self.config.space != "ncp":
            return {}
        noise, feature = median(metrics["noise"]), median(metrics["feature"])
        if not (0 < noise < float("inf") and 0 < feature < float("inf")):
            raise ValueError(f"beta cannot be calibrated on medians {noise:g} (noise) and {feature:g} (features)")
        return {BETA: self.config.beta * noise / feature}

    def _errors(
        self, batch: MicroBatch, network: Network, states: NoisedStates, model_output: Tensor, base: Tensor
    ) -> ErrorStatistics:
        if self.config.space == "eps":
            return statistics_of(batch, network, states, model_output, base)
        kind, levels = network.prediction_type, states.alpha_bars_B
        posterior = None if self.config.ncp.deterministic else _posterior_noise(batch)
        return ncp_statistics(
            lambda latents, timesteps: network.features(latents, timesteps, states.condition),
            noisy=states.latents, policy_noise=to_noise(model_output, states.latents, levels, kind),
            reference_noise=to_noise(base, states.latents, levels, kind), noise=states.noise,
            step=ncp_step(states.timesteps_B, network.alpha_bars, self.config.ncp.stride), posterior_noise=posterior,
        )  # fmt: skip


def _posterior_noise(batch: MicroBatch) -> Tensor:
    draws = [
        torch.randn(batch.clean.shape[1:], generator=torch.Generator().manual_seed(derive_seed("posterior", key)))
        for key in batch.noise_keys
    ]
    return torch.stack(draws).to(batch.clean)


class Dpo(Preference):
    """Diffusion-DPO, or NCP-DPO with `space: ncp`."""

    Config = DpoConfig

    config: DpoConfig

    @override
    def term(self, winner: ErrorStatistics, loser: ErrorStatistics, beta: float) -> PreferenceTerm:
        return preference_term("dpo" if self.config.loss == "sigmoid" else self.config.loss, winner, loser, beta=beta)


class Cpo(Preference):
    """CPO: preference without a reference, plus the winner's own error; NCP-CPO with `space: ncp`."""

    Config = CpoConfig

    config: CpoConfig

    @override
    def term(self, winner: ErrorStatistics, loser: ErrorStatistics, beta: float) -> PreferenceTerm:
        return preference_term("cpo", winner, loser, beta=beta, sft_weight=self.config.sft_weight * beta / 4)


class Sft(Preference):
    """Supervised fine-tuning: denoising loss on winners only, without a reference; NCP-SFT with `space: ncp`."""

    Config = SftConfig

    config: SftConfig

    @override
    def objective(
        self, batch: MicroBatch, network: Network, states: NoisedStates, model_output: Tensor, base: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().objective(batch, network, states, model_output, base)
        if self.config.min_snr_gamma is not None:
            loss = loss * min_snr_weight(states.alpha_bars_B, self.config.min_snr_gamma).to(loss)
        return loss, metrics

    @override
    def term(self, winner: ErrorStatistics, loser: ErrorStatistics, beta: float) -> PreferenceTerm:
        # Distances are converted to noise units, so that the anchor weight keeps its meaning.
        term = preference_term("sft", winner, loser, beta=beta)
        return replace(term, loss_P=term.loss_P * (beta / self.config.beta))
