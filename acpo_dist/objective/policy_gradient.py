"""Losses from advantages: NFT, reward-weighted regression, and DDPO's clipped surrogate.

Log-probabilities are **means over the elements of a latent**, in nats per element, as in the public DDPO code. The
log-density of the whole step is D times the mean. A ratio is therefore the D-th root of the true density ratio; clip
ranges do not depend on the resolution, and are small (DDPO's 1e-4 belongs to this convention). Advantages and ratios
are per sample; losses are not averaged over the batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from acpo_dist.diffusion.clean_rule import NO_RULE, CleanRule
from acpo_dist.diffusion.flow import flow_grpo_step
from acpo_dist.diffusion.prediction import to_clean, to_noise
from acpo_dist.objective.noise_space import ErrorStatistics


def nft_loss(statistics: ErrorStatistics, unit_advantage_B: Tensor, beta: float) -> Tensor:
    """Return advantage-weighted denoising with a noise-space anchor, 2 A c + beta a, per sample (B,).

    Equal, up to a constant and the factor beta, to DiffusionNFT's two branches
    r ||e + beta drift||^2 + (1 - r) ||e - beta drift||^2 with r = (1 + A) / 2. Bounded below, also for A < 0: the
    minimum lies at drift = -(A / beta) e.

    Args:
        statistics: errors with the old policy as reference, on x_t noised from the sample's own x_0 at any t.
            With the frozen base model as reference the minimiser stays fixed after the first iteration.
        unit_advantage_B: A in [-1, 1], constant.
        beta: strength of the anchor, > 0; at 1 the branches are the policy itself and its mirror image.

    Source: DiffusionNFT (Zheng et al. 2025).
    """
    return 2 * unit_advantage_B.detach() * statistics.cross_B + beta * statistics.drift_B


def nft_clean_loss(
    policy_clean: Tensor, old_clean: Tensor, clean: Tensor, unit_advantage_B: Tensor, beta: float
) -> Tensor:
    """Return DiffusionNFT's loss on x0 estimates, with branches divided by their mean absolute error, (B,).

    With r = (1 + A) / 2, y+ = (1 - beta) y_old + beta y and y- = (1 + beta) y_old - beta y:

        (r mean((y+ - x_0)^2) / |y+ - x_0|_1 + (1 - r) mean((y- - x_0)^2) / |y- - x_0|_1) / beta

    The divisors are means over the elements of a sample, at least 1e-5, and detached. The published code also
    multiplies the loss by the advantage's limit, which only changes its weight relative to the KL term.

    Args:
        policy_clean: x0-hat of the policy (B, ...), with the graph.
        old_clean: x0-hat of the old policy on the same input, constant.
        clean: x_0, constant.
        unit_advantage_B: A in [-1, 1], constant.
        beta: > 0.

    Source: DiffusionNFT (Zheng et al. 2025) and its public code.
    """
    share_B = (1 + unit_advantage_B.detach()) / 2
    old_clean, clean = old_clean.detach(), clean.detach()

    def branch(estimate: Tensor) -> Tensor:
        error = (estimate - clean).flatten(1)
        return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)

    positive = branch((1 - beta) * old_clean + beta * policy_clean)
    negative = branch((1 + beta) * old_clean - beta * policy_clean)
    return (share_B * positive + (1 - share_B) * negative) / beta


def reward_weights(advantage_G: Tensor, temperature: float) -> Tensor:
    """Return the weights of reward-weighted regression, G softmax(A / temperature) within one group, of mean 1.

    Args:
        advantage_G: advantages of one group of G samples, in standard deviations (not divided by the limit).
        temperature: > 0; small values select the best sample, large values weight all samples equally.

    Source: advantage-weighted regression (Peng et al. 2019), as reward-weighted denoising (Lee et al. 2023).
    """
    return len(advantage_G) * torch.softmax(advantage_G.detach() / temperature, dim=0)


@dataclass(frozen=True, kw_only=True)
class Transition:
    """The Gaussian of one stochastic reverse step."""

    mean: Tensor
    """(B, ...), float32 or wider, with the graph of the network output."""
    std_B: Tensor
    """Standard deviation in units of x, > 0."""

    def draw(self, noise: Tensor) -> Tensor:
        """Return the next state (B, ...); equal to the sampler's step with this noise."""
        return self.mean + _per_sample(self.std_B, self.mean) * noise

    def log_prob(self, next_state: Tensor) -> Tensor:
        """Return the log-density (B,) of the step to `next_state`, in nats per element (mean over elements).

        Args:
            next_state: x after the step exactly as stored, constant. If it was rounded for transfer, the old
                log-probability must be computed from the rounded state too, otherwise the first ratio is not 1.
        """
        deviation = (next_state.detach().to(self.mean.dtype) - self.mean) / _per_sample(self.std_B, self.mean)
        return -deviation.square().flatten(1).mean(1) / 2 - self.std_B.log() - 0.5 * math.log(2 * math.pi)


def transition(
    model_output: Tensor,
    noisy: Tensor,
    alpha_bar_t_B: Tensor,
    alpha_bar_prev_B: Tensor,
    prediction_type: str,
    *,
    eta: float,
    kind: str = "ddim",
    rule: CleanRule = NO_RULE,
) -> Transition:
    """Return the stochastic step between two levels; samples of a batch may be at different steps.

    DDIM: sigma^2 = eta^2 (1 - prev) / (1 - t) (1 - t / prev), mean = sqrt(prev) x0-hat + sqrt(1 - prev - sigma^2)
    eps-hat.
    For flow models this is the coefficient-preserving stochastic step, exact from pure noise (t = 0) on. It supports
    non-uniform trajectories, since no timestep is derived from a spacing.

    Args:
        model_output: network output at x_t, guided if the rollout was guided.
        noisy: x_t.
        alpha_bar_t_B: level before the step, in [0, 1); 0 for velocity predictions only.
        alpha_bar_prev_B: level after it, in (alpha_bar_t, 1).
        eta: in (0, 1]; 1 is DDPM's posterior. The noise level of `flow_grpo`.
        kind: `ddim`, or `flow_grpo` for flow predictions (see `diffusion.flow.flow_grpo_step`).
        prediction_type: a name in `prediction.PREDICTION_TYPES`.
        rule: rule that the model's scheduler applies to x0-hat; clipped elements pass no gradient.

    Raises:
        ValueError: eta is outside (0, 1], or the step has no density: it ends at x_0 (alpha_bar_prev = 1) or does not
            lower the noise.

    Source: DDIM (Song et al. 2021), eq. 12 and 16; Flow-GRPO (Liu et al. 2025), eq. 9.
    """
    if not 0 < eta <= 1:
        raise ValueError(f"a stochastic step needs 0 < eta <= 1, found {eta}; with eta = 0 it has no density")
    before, after = alpha_bar_t_B.double(), alpha_bar_prev_B.double()
    # x_0 is undefined at pure noise, except for velocities.
    lowest = before >= 0 if prediction_type in ("v_prediction", "flow_prediction") else before > 0
    fits = lowest & (before < after) & (after < 1)
    if not bool(fits.all()):
        bad = int(fits.long().argmin())
        raise ValueError(
            "a stochastic step needs 0 <= alpha_bar_t < alpha_bar_prev < 1; a step that ends clean is deterministic "
            f"and has no density. Found {float(before[bad]):g} -> {float(after[bad]):g} for sample {bad} of the batch"
        )
    model_output = rule.apply(model_output, noisy, alpha_bar_t_B, prediction_type)
    if kind == "flow_grpo":
        mean, std_B = flow_grpo_step(model_output, noisy, alpha_bar_t_B, alpha_bar_prev_B, eta)
        return Transition(mean=mean, std_B=std_B)
    clean = to_clean(model_output, noisy, alpha_bar_t_B, prediction_type)
    direction = to_noise(model_output, noisy, alpha_bar_t_B, prediction_type)
    variance = eta**2 * (1 - after) / (1 - before) * (1 - before / after)
    mean = _per_sample(after.sqrt(), clean) * clean + _per_sample((1 - after - variance).sqrt(), clean) * direction
    return Transition(mean=mean, std_B=variance.sqrt().to(device=mean.device, dtype=mean.dtype))


@dataclass(frozen=True, kw_only=True)
class SurrogateTerm:
    """Clipped surrogate of one transition per sample."""

    loss_B: Tensor
    """Loss per sample, with the graph."""
    ratio_B: Tensor
    """Per-element probability ratio, detached."""
    is_clipped_B: Tensor
    """bool: the sample passes no gradient in this optimiser step."""


def clipped_surrogate(
    log_prob_B: Tensor, old_log_prob_B: Tensor, advantage_B: Tensor, clip_range: float
) -> SurrogateTerm:
    """Return max(-A r, -A clip(r, 1 - range, 1 + range)) with r = exp(log_prob - old_log_prob).

    Args:
        log_prob_B: nats per element, float32 or wider, with the graph.
        old_log_prob_B: log-probability of the same transitions under the policy that drew them, constant.
        advantage_B: A in standard deviations, constant.
        clip_range: range of the per-element ratio, 1e-4 in the public DDPO code.

    Source: PPO (Schulman et al. 2017), eq. 7, as applied by DDPO (Black et al. 2023).
    """
    advantage_B = advantage_B.detach()
    ratio = (log_prob_B - old_log_prob_B.detach()).exp()
    loss = torch.maximum(-advantage_B * ratio, -advantage_B * ratio.clamp(1 - clip_range, 1 + clip_range))
    seen = ratio.detach()
    outside = ((seen > 1 + clip_range) & (advantage_B > 0)) | ((seen < 1 - clip_range) & (advantage_B < 0))
    return SurrogateTerm(loss_B=loss, ratio_B=seen, is_clipped_B=outside)


def _per_sample(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.ndim - 1))
