"""ACPO: raises the perceptual score at late timesteps and anchors the noise prediction to the base model's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

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
from acpo_dist.algorithms.tail import low_variance_tail, passed_states, sample_tail, states_at
from acpo_dist.core.seeding import derive_seed
from acpo_dist.diffusion.prediction import to_clean
from acpo_dist.diffusion.sampling import guide
from acpo_dist.objective.anchor import anchor_error, output_drift
from acpo_dist.objective.noise_space import denoising_residual
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
        """Run one policy and one base forward on states of the rollouts, and the same at uniform timesteps."""
        condition = network.encode(batch.prompts)
        metrics: dict[str, Tensor] = {}
        total = torch.zeros(len(batch.sample_ids), device=batch.clean.device)
        late, scale, outputs, clean = self._scored(batch, network)
        answer = None
        if self.config.reward_weight > 0:
            # The pool decodes, scores and differentiates in parallel with the anchor's forward passes.
            answer = reward(clean, batch.prompts * (len(clean) // len(batch.prompts)))
        on_data = self._on_data(batch, network, reward)
        if outputs is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and anchor_weight > 0):
                outputs = both_branches(network, late, batch.prompts, scale)
        model_output, null = outputs
        # Without an anchor the drift is still measured on the rollouts, for the metrics.
        with torch.no_grad(), network.anchored():
            anchor, null_anchor = both_branches(network, late, batch.prompts, scale)
        space, levels = self.config.anchor.space, late.alpha_bars_B
        drift = anchor_error(output_drift(model_output, anchor, levels, network.prediction_type, space))
        if null is not None and null_anchor is not None:
            # Each branch is anchored separately, since drifts of opposite sign can cancel in the guided sum.
            null_drift = anchor_error(output_drift(null, null_anchor, levels, network.prediction_type, space))
            metrics["anchor/late_null"] = null_drift.detach()
            drift = (drift + null_drift) / 2
        metrics["anchor/late"] = drift.detach()
        if anchor_weight > 0:
            total = total + anchor_weight * drift
        learns_data = self.config.data_weight > 0 and batch.clean_is_real
        if (anchor_weight > 0 and self.config.anchor.uniform) or learns_data:
            own = condition if batch.clean_prompts is None else None
            uniform, denoising, is_null = self._uniform(batch, network, own)
            if self.config.anchor.uniform:
                total = total + anchor_weight * uniform
            metrics["anchor/uniform"] = uniform.detach()
            metrics |= split_branches(uniform.detach(), is_null)
            if batch.clean_is_real:
                total = total + self.config.data_weight * denoising
                metrics["data/denoising"] = denoising.detach()
        if answer is not None:
            term, seen = self._perceptual(clean, answer())
            term = term.reshape(-1, len(batch.sample_ids)).mean(0)
            total = total + self.config.reward_weight * batch.weights_B * term
            metrics |= seen
        if on_data is not None:
            estimate, wait = on_data
            term, seen = self._perceptual(estimate, wait())
            total = total + self.config.data_reward_weight * term
            metrics |= {f"data/{name}": value for name, value in seen.items()}
        return Loss(per_sample=total, metrics=metrics)

    def _scored(
        self, batch: MicroBatch, network: Network
    ) -> tuple[LateStates, float, tuple[Tensor, Tensor | None] | None, Tensor]:
        """Return the states to anchor, the guidance scale, the outputs there if known, and the scored x_0."""
        if batch.tail is None:
            late, scale = batch.late, batch.guidance_scale if self.config.guidance == "full" else 1.0
            outputs = both_branches(network, late, batch.prompts, scale)
            guided = outputs[0] if outputs[1] is None else guide(outputs[0], outputs[1], scale, batch.guidance_rescale)
            return late, scale, outputs, to_clean(guided, late.latents, late.alpha_bars_B, network.prediction_type)
        sampled = sample_tail(network, batch.tail, batch.prompts, batch.guidance_scale, batch.guidance_rescale)
        late = passed_states(sampled, batch.tail, batch.noise_keys)
        # After the first step the states depend on the weights; anchor gradients must not pass through them.
        outputs = sampled.outputs if batch.tail.trajectory.num_steps == 1 else None
        return late, batch.guidance_scale, outputs, sampled.clean

    def _on_data(
        self, batch: MicroBatch, network: Network, reward: RewardGradient
    ) -> tuple[Tensor, Callable[[], RewardSignal]] | None:
        """Request the reward on x0-hat of the real images at late timesteps; None without `data_reward_weight`."""
        if self.config.data_reward_weight == 0 or not batch.clean_is_real:
            return None
        keys = tuple(derive_seed("data reward", key) for key in batch.noise_keys)
        states = noise_forward(replace(batch, noise_keys=keys), network, lowest=1, t_max=batch.latest_share)
        model_output = network.predict(states.latents, states.timesteps_B, states.condition)
        clean = to_clean(model_output, states.latents, states.alpha_bars_B, network.prediction_type)
        return clean, reward(clean, batch.prompts if batch.clean_prompts is None else batch.clean_prompts)

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
        residual = denoising_residual(
            model_output, states.latents, batch.clean, states.noise, states.alpha_bars_B, kind
        )
        return anchor_error(drift), anchor_error(residual), states.is_null_B


class Draft(Acpo):
    """Reward gradient through the last sampler steps, without an anchor by default: DRaFT-K, DRaFT-LV and AlignProp.

    Source: DRaFT (Clark et al. 2023); AlignProp (Prabhudesai et al. 2023) for `gradient_steps: random`.
    """

    Config = DraftConfig
    config: DraftConfig

    @override
    def _scored(
        self, batch: MicroBatch, network: Network
    ) -> tuple[LateStates, float, tuple[Tensor, Tensor | None] | None, Tensor]:
        count = self.config.low_variance_samples
        if count == 1 or batch.tail is None:
            return super()._scored(batch, network)
        tail = low_variance_tail(batch, batch.tail, count)
        sampled = sample_tail(network, tail, batch.prompts * count, batch.guidance_scale, batch.guidance_rescale)
        size = len(batch.sample_ids)
        conditional, null = sampled.outputs
        outputs = conditional[:size], None if null is None else null[:size]
        return states_at(tail.latents[:size], tail.trajectory, 0), batch.guidance_scale, outputs, sampled.clean


class Refl(Acpo):
    """ReFL: hinge on the score of x0-hat, from the conditional branch at one late state; no anchor by default.

    For the paper's denoising loss on real images set `data_weight` and `anchor.source: data`.

    Source: ReFL (Xu et al. 2023, ImageReward).
    """

    Config = ReflConfig
