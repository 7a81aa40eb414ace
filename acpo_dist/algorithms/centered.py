"""Centered reward distillation: the policy's implicit rewards are fitted to the given ones, within each prompt."""

import torch
from torch import Tensor

from acpo_dist.algorithms.base import MicroBatch, Network
from acpo_dist.algorithms.config import CrdConfig
from acpo_dist.algorithms.denoising import NoiseSpaceAlgorithm, old_output
from acpo_dist.algorithms.grouping import unit_selection
from acpo_dist.algorithms.noising import NoisedStates
from acpo_dist.core.types import ScoredGroups, Selection
from acpo_dist.diffusion.sampling import guide
from acpo_dist.objective.centered import centered, implicit_reward, kl_weights
from acpo_dist.objective.noise_space import target_output


class Crd(NoiseSpaceAlgorithm):
    """CRD: implicit rewards, centered within each prompt, follow the centered advantages.

    The loss uses three networks: the policy, the old policy (an average of the policy's weights), and the base model
    with guidance. Errors are in the units of the network's output: velocities for flow models, as published. The policy
    itself draws, as published for the first 75 steps; the published average that draws later is not offered. The paper
    samples without guidance: `sampler.guidance_scale=1`.

    Source: Centered Reward Distillation (arXiv 2603.14128), with uniform weights and the squared loss.
    """

    Config = CrdConfig

    def __init__(self, config: CrdConfig) -> None:
        """Store the configuration."""
        self.config = config

    def select(self, scored: ScoredGroups) -> Selection:
        """Select all samples with weights A / limit, in [-1, 1]."""
        return unit_selection(scored, self.config.advantage)

    def objective(
        self, batch: MicroBatch, network: Network, states: NoisedStates, model_output: Tensor, base: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the squared loss and the KL term; samples that are predicted without prompt are not compared."""
        config = self.config
        old = old_output(network, states)
        target = target_output(batch.clean, states.noise, states.alpha_bars_B, network.prediction_type)
        share_B = (1 + batch.weights_B) / 2
        reward_B = implicit_reward(model_output, old, target)
        seen = ~states.is_null_B
        difference_B = config.beta * centered(reward_B, batch.prompts, seen) - centered(share_B, batch.prompts, seen)
        loss_B = config.advantage.limit / config.beta * difference_B.square()
        metrics = {"crd/loss": loss_B, "crd/implicit_reward": reward_B}
        if config.kl_weight > 0:
            reference = self._guided(batch, network, states, base)
            distance_B = (model_output - reference).square().flatten(1).mean(1)
            loss_B = loss_B + kl_weights(share_B, config.kl_weight, adaptive=config.kl_adaptive) * distance_B
            metrics["crd/kl"] = distance_B
        return loss_B, {name: value.detach()[seen] for name, value in metrics.items()}

    def _guided(self, batch: MicroBatch, network: Network, states: NoisedStates, base: Tensor) -> Tensor:
        if self.config.kl_guidance == 1 or not any(batch.prompts):
            return base
        with torch.no_grad(), network.anchored():
            null = network.predict(states.latents, states.timesteps_B, network.encode([""] * len(batch.prompts)))
        return guide(base, null, self.config.kl_guidance)
