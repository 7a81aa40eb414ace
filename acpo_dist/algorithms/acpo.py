"""ACPO: raise the perceptual score at late timesteps, hold the noise prediction to the base model's everywhere."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from acpo_dist.algorithms.base import Loss, MicroBatch, Network, RewardGradient
from acpo_dist.config.section import Section
from acpo_dist.core.types import ScoreTable
from acpo_dist.diffusion.prediction import add_noise, to_clean, to_noise
from acpo_dist.objective.anchor import anchor_error, head_drift
from acpo_dist.objective.perceptual import shape_reward, surrogate


class AnchorConfig(Section):
    """How the policy is held near the base model."""

    weight: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Anchor weight; `auto` starts from the budget and the measured reward gradient; 0 switches the anchor off."""
    budget: float | None = Field(default=0.15, gt=0)
    """Wanted rms drift of the noise prediction; None holds the weight fixed."""
    rate: float = Field(default=0.1, ge=0)
    """Rate of the drift controller; 0 holds the weight fixed."""
    headroom: float = Field(default=0.8, gt=0, le=1)
    """Share of the budget that the controller aims at; drift is noisy, so small batches need more room."""
    uniform: bool = True
    """Anchor a second batch at uniform timesteps too, so that early steps cannot drift unseen."""
    null_share: float = Field(default=0.1, ge=0, le=1)
    """Share of that batch that is anchored without its prompt: guidance uses that branch."""
    source: Literal["rollout", "data"] = "rollout"
    """What that batch is noised from: the rollouts' own x_0, or real pictures (`data.path`, pixel models)."""
    space: Literal["eps", "v", "x0"] = "eps"
    """Units of the anchor; `v` suits v-prediction with zero terminal SNR, where an eps-anchor vanishes."""


class Acpo:
    """The anchor-constrained perceptual update."""

    class Config(Section):
        """Shape of the reward, and the anchor."""

        type: Literal["acpo"] = "acpo"
        reward_weight: float = Field(default=1.0, ge=0)
        """Reward per standard deviation of base samples; 0 leaves the anchor alone."""
        shape: Literal["identity", "hinge", "softplus"] = "identity"
        """Minimise -q, max(m - q, 0) or softplus(m - q) of the normalised quality q."""
        target_quantile: float = Field(default=0.9, gt=0, lt=1)
        """m as a quantile of base-model samples, for `hinge` and `softplus`."""
        anchor: AnchorConfig = AnchorConfig()
        data_weight: float = Field(default=0.0, ge=0)
        """Weight of the ordinary denoising loss on real pictures (`data.path`), on the anchor's uniform batch."""
        pathwise: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        """Take the recipe."""
        self.config = config

    def select(self, sample_ids: Sequence[str], scores: ScoreTable) -> dict[str, float]:
        """Every sample counts the same: the gradient says where to go, the score need not."""
        return dict.fromkeys(sample_ids, 1.0)

    def loss(self, batch: MicroBatch, network: Network, reward: RewardGradient, anchor_weight: float) -> Loss:
        """One policy and one base forward on the late states; the same again at uniform timesteps."""
        condition = network.encode(batch.prompts)
        head = network.predict(batch.late_latents, batch.late_timesteps_B, condition)
        figures: dict[str, Tensor] = {}
        total = torch.zeros(len(batch.sample_ids), device=head.device)
        if self.config.reward_weight > 0:
            term, seen = self._perceptual(batch, head, network.prediction_type, reward)
            total = total + self.config.reward_weight * term
            figures |= seen
        # Without an anchor the drift is still measured on the rollouts: it is the price of what is gained.
        with torch.no_grad(), network.anchored():
            anchor = network.predict(batch.late_latents, batch.late_timesteps_B, condition)
        late = anchor_error(
            head_drift(head, anchor, batch.late_alpha_bars_B, network.prediction_type, self.config.anchor.space)
        )
        figures["anchor/late"] = late.detach()
        if anchor_weight > 0:
            total = total + anchor_weight * late
            if self.config.anchor.uniform:
                uniform, denoising, is_null = self._uniform(batch, network, condition)
                total = total + anchor_weight * uniform
                figures["anchor/uniform"] = uniform.detach()
                figures |= split_branches(uniform.detach(), is_null)
                if batch.clean_is_real:
                    total = total + self.config.data_weight * denoising
                    figures["data/denoising"] = denoising.detach()
        return Loss(per_sample=batch.weights_B * total, figures=figures)

    def _perceptual(
        self, batch: MicroBatch, head: Tensor, prediction_type: str, reward: RewardGradient
    ) -> tuple[Tensor, dict[str, Tensor]]:
        clean = to_clean(head, batch.late_latents, batch.late_alpha_bars_B, prediction_type)
        signal = reward(clean, batch.prompts)
        value, slope = shape_reward(signal.quality_B, self.config.shape, signal.target)
        figures = {"reward/loss": value, "reward/quality": signal.quality_B, "reward/active": (slope != 0).float()}
        norm = signal.gradient.flatten(1).norm(dim=1)
        return surrogate(clean, signal.gradient, slope), figures | {"reward/gradient_norm": norm} | dict(
            signal.per_metric
        )

    def _uniform(self, batch: MicroBatch, network: Network, condition: Any) -> tuple[Tensor, Tensor, Tensor]:
        draws = [self._draw(key, batch.clean.shape[1:], len(network.alpha_bars)) for key in batch.noise_keys]
        device = batch.clean.device
        timesteps = torch.tensor([timestep for timestep, _, _ in draws], device=device)
        is_null = torch.tensor([null for _, null, _ in draws], device=device)
        noise = torch.stack([noise for _, _, noise in draws]).to(device)
        alpha_bars = network.alpha_bars[timesteps.cpu()].to(device)
        noisy = add_noise(batch.clean, noise, alpha_bars)
        condition = condition.where_null(is_null, network.encode([""] * len(draws)))
        head = network.predict(noisy, timesteps, condition)
        with torch.no_grad(), network.anchored():
            anchor = network.predict(noisy, timesteps, condition)
        drift = head_drift(head, anchor, alpha_bars, network.prediction_type, self.config.anchor.space)
        predicted = to_noise(head, noisy, alpha_bars, network.prediction_type)
        return anchor_error(drift), anchor_error(predicted - noise), is_null

    def _draw(self, key: int, shape: torch.Size, num_timesteps: int) -> tuple[int, bool, Tensor]:
        generator = torch.Generator().manual_seed(key)
        timestep = int(torch.randint(num_timesteps, (), generator=generator))
        null = bool(torch.rand((), generator=generator) < self.config.anchor.null_share)
        return timestep, null, torch.randn(shape, generator=generator)


def split_branches(error_B: Tensor, is_null_B: Tensor) -> dict[str, Tensor]:
    """The two branches apart, each as the entries that belong to it (means are taken over those alone)."""
    parts = {"anchor/conditional": error_B[~is_null_B], "anchor/null": error_B[is_null_B]}
    return {name: values for name, values in parts.items() if len(values)}
