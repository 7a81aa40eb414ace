"""ACPO: raise the perceptual score at late timesteps, hold the noise prediction to the base model's everywhere."""

from typing import Any

import torch
from torch import Tensor

from acpo_dist.algorithms.base import (
    BaseAlgorithm,
    LateStates,
    Loss,
    MicroBatch,
    Network,
    RewardGradient,
    RewardSignal,
)
from acpo_dist.algorithms.branches import both_branches
from acpo_dist.algorithms.config import AcpoConfig, DraftConfig, ReflConfig
from acpo_dist.algorithms.noising import noise_forward, split_branches
from acpo_dist.diffusion.prediction import to_clean, to_noise
from acpo_dist.diffusion.sampling import guide
from acpo_dist.objective.anchor import anchor_error, output_drift
from acpo_dist.objective.perceptual import shape_reward, surrogate


class Acpo(BaseAlgorithm):
    """The anchor-constrained perceptual update."""

    Config = AcpoConfig

    def __init__(self, config: AcpoConfig) -> None:
        """Store the configuration."""
        self.config = config

    def loss(
        self, batch: MicroBatch, network: Network, reward: RewardGradient, anchor_weight: float,
        prepared_B: Tensor | None = None,
    ) -> Loss:  # fmt: skip
        """One policy and one base forward on the late states; the same again at uniform timesteps."""
        condition = network.encode(batch.prompts)
        late = self._late(batch, network)
        scale = batch.guidance_scale if self.config.guidance == "full" else 1.0
        model_output, null = both_branches(network, late, batch.prompts, scale)
        metrics: dict[str, Tensor] = {}
        total = torch.zeros(len(batch.sample_ids), device=model_output.device)
        clean, answer = None, None
        if self.config.reward_weight > 0:
            guided = model_output if null is None else guide(model_output, null, scale)
            clean = to_clean(guided, late.latents, late.alpha_bars_B, network.prediction_type)
            # The pool decodes, scores and differentiates while the anchor's forwards run here.
            answer = reward(clean, batch.prompts)
        # Without an anchor the drift is still measured on the rollouts: it is the price of what is gained.
        with torch.no_grad(), network.anchored():
            anchor, null_anchor = both_branches(network, late, batch.prompts, scale)
        space, levels = self.config.anchor.space, late.alpha_bars_B
        drift = anchor_error(output_drift(model_output, anchor, levels, network.prediction_type, space))
        if null is not None and null_anchor is not None:
            # Each branch by itself: in their guided sum the drift of one can hide that of the other.
            null_drift = anchor_error(output_drift(null, null_anchor, levels, network.prediction_type, space))
            metrics["anchor/late_null"] = null_drift.detach()
            drift = (drift + null_drift) / 2
        metrics["anchor/late"] = drift.detach()
        if anchor_weight > 0:
            total = total + anchor_weight * drift
            if self.config.anchor.uniform:
                uniform, denoising, is_null = self._uniform(batch, network, condition)
                total = total + anchor_weight * uniform
                metrics["anchor/uniform"] = uniform.detach()
                metrics |= split_branches(uniform.detach(), is_null)
                if batch.clean_is_real:
                    total = total + self.config.data_weight * denoising
                    metrics["data/denoising"] = denoising.detach()
        if clean is not None and answer is not None:
            term, seen = self._perceptual(clean, answer())
            total = total + self.config.reward_weight * batch.weights_B * term
            metrics |= seen
        return Loss(per_sample=total, metrics=metrics)

    def _late(self, batch: MicroBatch, network: Network) -> LateStates:
        """Where the reward acts."""
        return batch.late

    def _perceptual(self, clean: Tensor, signal: RewardSignal) -> tuple[Tensor, dict[str, Tensor]]:
        value, slope = shape_reward(signal.quality_B, self.config.shape, signal.target)
        metrics = {"reward/loss": value, "reward/quality": signal.quality_B, "reward/active": (slope != 0).float()}
        norm = signal.gradient.flatten(1).norm(dim=1)
        return surrogate(clean, signal.gradient, slope), metrics | {"reward/gradient_norm": norm} | dict(
            signal.per_metric
        )

    def _uniform(self, batch: MicroBatch, network: Network, condition: Any) -> tuple[Tensor, Tensor, Tensor]:
        states = noise_forward(batch, network, null_share=self.config.anchor.null_share, condition=condition)
        model_output = network.predict(states.latents, states.timesteps_B, states.condition)
        with torch.no_grad(), network.anchored():
            anchor = network.predict(states.latents, states.timesteps_B, states.condition)
        kind = network.prediction_type
        drift = output_drift(model_output, anchor, states.alpha_bars_B, kind, self.config.anchor.space)
        predicted = to_noise(model_output, states.latents, states.alpha_bars_B, kind)
        return anchor_error(drift), anchor_error(predicted - states.noise), states.is_null_B


class Draft(Acpo):
    """The reward's gradient alone, as in DRaFT with one step: ACPO without its anchor, for comparison."""

    Config = DraftConfig


class Refl(Acpo):
    """ReFL's data regime: late states noised forward from x_0 instead of those that rollouts passed; hinge, no anchor.

    Source: ReFL (Xu et al. 2023, ImageReward), for the hinge and the late range; regime F of the ACPO formulas.
    """

    Config = ReflConfig

    config: ReflConfig

    def _late(self, batch: MicroBatch, network: Network) -> LateStates:
        states = noise_forward(batch, network, lowest=1, t_max=self.config.t_max)
        return LateStates(latents=states.latents, timesteps_B=states.timesteps_B, alpha_bars_B=states.alpha_bars_B)
