"""Algorithms whose loss is a function of the noise prediction: one policy and one base forward on noised samples.

The anchor uses the same two forwards and adds no network calls.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from acpo_dist.algorithms.base import (
    BaseAlgorithm,
    Loss,
    MicroBatch,
    Network,
    RewardGradient,
)
from acpo_dist.algorithms.config import NftConfig, RwrConfig
from acpo_dist.algorithms.grouping import advantages_of, grouped_selection, unit_selection
from acpo_dist.algorithms.noising import NoisedStates, noise_forward, split_branches
from acpo_dist.core.types import ScoredGroups, Selection
from acpo_dist.diffusion.prediction import to_clean
from acpo_dist.objective.anchor import anchor_error, loss_space, output_drift
from acpo_dist.objective.noise_space import ErrorStatistics, noise_statistics, target_output
from acpo_dist.objective.policy_gradient import nft_clean_loss, nft_loss, reward_weights


class NoiseSpaceAlgorithm(BaseAlgorithm):
    """Base class that computes states, forward passes and the anchor; subclasses implement the objective."""

    config: Any

    def loss(
        self, batch: MicroBatch, network: Network, reward: RewardGradient, anchor_weight: float,
        prepared_B: Tensor | None = None,
    ) -> Loss:  # fmt: skip
        """Compute the weighted objective, and the anchor on all samples.

        With an anchor, a share of the samples is predicted without its prompt and excluded from the objective. With
        `prompt_dropout`, that share is trained without its prompt instead.
        """
        anchor, dropout = self.config.anchor, self.config.prompt_dropout
        # A state at t = 0 is x_0 itself: it carries no noise, and NCP's reverse step is undefined there.
        states = noise_forward(
            batch,
            network,
            lowest=1,
            t_max=self.config.t_max,
            drawing=self.config.timesteps,
            null_share=dropout or (anchor.null_share if anchor_weight > 0 else 0.0),
            offset=self.config.offset_noise,
        )
        model_output, base = both_outputs(network, states)
        drift = anchor_error(
            output_drift(model_output, base, states.alpha_bars_B, network.prediction_type, anchor.space)
        )
        # An unreadable image is replaced by a placeholder, which must not enter the anchor.
        drift = torch.where(batch.readable, drift, torch.zeros_like(drift))
        objective, metrics = self.objective(batch, network, states, model_output, base)
        if not dropout:
            objective = torch.where(states.is_null_B, torch.zeros_like(objective), objective)
        seen = batch.readable
        metrics["anchor/uniform"] = drift.detach()[seen]
        metrics |= split_branches(drift.detach()[seen], states.is_null_B[seen])
        return Loss(per_sample=self.config.reward_weight * objective + anchor_weight * drift, metrics=metrics)

    @abstractmethod
    def objective(
        self, batch: MicroBatch, network: Network, states: NoisedStates, model_output: Tensor, base: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted per-sample loss (B,) and per-sample metrics (B,)."""


def both_outputs(network: Network, states: NoisedStates) -> tuple[Tensor, Tensor]:
    """Return the outputs of the policy, with the graph, and of the frozen base model on the same inputs."""
    model_output = network.predict(states.latents, states.timesteps_B, states.condition)
    with torch.no_grad(), network.anchored():
        base = network.predict(states.latents, states.timesteps_B, states.condition)
    return model_output, base


def old_output(network: Network, states: NoisedStates) -> Tensor:
    """Return the output of the old policy on the same inputs, without a graph."""
    with torch.no_grad(), network.old():
        return network.predict(states.latents, states.timesteps_B, states.condition)


def statistics_of(
    batch: MicroBatch, network: Network, states: NoisedStates, model_output: Tensor, base: Tensor
) -> ErrorStatistics:
    """Return the errors of policy and base model against the drawn noise, in noise units; velocity for flow models."""
    kind = network.prediction_type
    target = target_output(batch.clean, states.noise, states.alpha_bars_B, kind)
    return noise_statistics(model_output, base, target, states.alpha_bars_B, kind, space=loss_space(kind))


class Nft(NoiseSpaceAlgorithm):
    """DiffusionNFT: denoising towards good samples and away from bad ones, relative to the policy that drew them.

    The loss uses three networks: the policy, the old policy, and the base model. The anchor limits the
    drift from the base model (the KL term of the paper). The paper samples without guidance:
    `sampler.guidance_scale=1`.

    Source: DiffusionNFT (Zheng et al. 2025).
    """

    Config = NftConfig

    def __init__(self, config: NftConfig) -> None:
        """Store the configuration."""
        self.config = config

    def select(self, scored: ScoredGroups) -> Selection:
        """Select all samples with weights A / limit, in [-1, 1]."""
        return unit_selection(scored, self.config.advantage)

    def objective(
        self, batch: MicroBatch, network: Network, states: NoisedStates, model_output: Tensor, base: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the two branches; policy and old policy are evaluated at the same states."""
        old = old_output(network, states)
        statistics = statistics_of(batch, network, states, model_output, old)
        if self.config.weighting == "noise":
            loss = nft_loss(statistics, batch.weights_B, self.config.beta)
        else:
            kind, levels = network.prediction_type, states.alpha_bars_B
            policy_clean, old_clean = (to_clean(each, states.latents, levels, kind) for each in (model_output, old))
            loss = nft_clean_loss(policy_clean, old_clean, batch.clean, batch.weights_B, self.config.beta)
        seen = batch.weights_B != 0
        metrics = {
            "nft/loss": loss, "nft/cross": batch.weights_B * statistics.cross_B, "nft/old_drift": statistics.drift_B,
        }  # fmt: skip
        return loss, {name: value.detach()[seen] for name, value in metrics.items()}


class Rwr(NoiseSpaceAlgorithm):
    """Reward-weighted regression: the denoising loss on the policy's own samples, weighted by their advantages."""

    Config = RwrConfig

    def __init__(self, config: RwrConfig) -> None:
        """Store the configuration."""
        self.config = config

    def select(self, scored: ScoredGroups) -> Selection:
        """Select all samples with weights G softmax(A / temperature) within each group, of mean 1."""
        advantages = advantages_of(scored, self.config.advantage)
        weights: dict[str, float] = {}
        for group in advantages.groups:
            values = torch.tensor([advantages.values[name] for name in group], dtype=torch.float64)
            weights |= dict(zip(group, reward_weights(values, self.config.temperature).tolist(), strict=True))
        return grouped_selection(scored, weights, advantages.counts)

    def objective(
        self, batch: MicroBatch, network: Network, states: NoisedStates, model_output: Tensor, base: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted denoising error."""
        error = statistics_of(batch, network, states, model_output, base).policy_error
        return batch.weights_B * error, {"denoising/error": error.detach()[batch.weights_B != 0]}
