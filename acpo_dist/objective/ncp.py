"""NCP: errors of features at the state after one reverse step, instead of errors of the noise.

From one x_t the policy, the reference and the true noise each take the same step to t', with the same noise z; the
errors are distances between the features f(., t') of the resulting states, P_j = mean (f(x^j) - f(x*))^2.

Precision: predictions that differ by 1 % move x_{t'} by about 5e-5 at stride 1, and the preference logit is a
difference of such differences. Rounding states to bfloat16 or TF32 destroys it (correlation with float64 below 0.6 on
toy-sdxl, compared with 0.99998 in float32). States and statistics are therefore float32 or wider, and f must run in
full float32; TF32 is insufficient, also at stride 20.

Source: NCP (IEEE Access 13:193745, 2025), implemented from the formulas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acpo_dist.diffusion.prediction import add_noise, signal_and_noise
from acpo_dist.objective.noise_space import ErrorStatistics, error_statistics

Features = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""(x_{t'} of shape (B, ...), t' (B,)) -> one or more feature tensors (B, ...), float32 or wider."""


@dataclass(frozen=True, kw_only=True)
class NcpStep:
    """Reverse step from level t to level t', shared by policy, reference and true noise."""

    timesteps_B: Tensor
    """t' (B,), on which the encoder is conditioned."""
    alpha_bar_t_B: Tensor
    alpha_bar_to_B: Tensor


def ncp_step(timesteps_B: Tensor, alpha_bars_T: Tensor, stride: int) -> NcpStep:
    """Return the step to t' = max(t - stride, 0).

    Args:
        timesteps_B: t, integers of at least 1.
        alpha_bars_T: cumulative signal fraction by timestep, float64, on the CPU.
        stride: timesteps of the step; 1 is the published method, 20 moves the state about ten times as far.

    Raises:
        ValueError: a timestep or the stride is below 1.
    """
    at = timesteps_B.cpu()
    if stride < 1 or int(at.min()) < 1:
        raise ValueError(f"NCP needs timesteps >= 1 and a stride >= 1, found {int(at.min())} and {stride}")
    to = (at - stride).clamp(min=0)
    device = timesteps_B.device
    return NcpStep(
        timesteps_B=to.to(device),
        alpha_bar_t_B=alpha_bars_T[at].to(device),
        alpha_bar_to_B=alpha_bars_T[to].to(device),
    )


def reverse_state(
    noisy: Tensor, noise_estimate: Tensor, alpha_bar_t_B: Tensor, alpha_bar_to_B: Tensor, posterior_noise: Tensor | None
) -> Tensor:
    """Return x at the lower level for the given noise estimate.

    With z: DDPM's posterior, (x_t - b / s_t eps) / sqrt(1 - b) + sigma z, where 1 - b = alpha_bar_t / alpha_bar_t' and
    sigma^2 = (1 - alpha_bar_t') / (1 - alpha_bar_t) b. Without z: the deterministic DDIM step a' x0-hat + s' eps.

    Args:
        noisy: x_t (B, ...).
        noise_estimate: eps, same shape; with the graph for the policy.
        alpha_bar_t_B: level before the step, in (0, 1).
        alpha_bar_to_B: level after the step.
        posterior_noise: z, shared by policy, reference and truth, and by the two samples of a pair; None for the
            deterministic step, which is meant for strides above 1 (the posterior mean moves twice as fast).

    Returns:
        The state (B, ...) in float32, or float64 if an input is float64.

    Source: Ho et al. 2020, eq. 7 and 11; DDIM (Song et al. 2021), eq. 12.
    """
    width = torch.promote_types(torch.promote_types(noisy.dtype, noise_estimate.dtype), torch.float32)
    noisy, noise_estimate = noisy.to(width), noise_estimate.to(width)
    if posterior_noise is None:
        signal, spread = signal_and_noise(alpha_bar_t_B, noisy)
        return add_noise((noisy - spread * noise_estimate) / signal, noise_estimate, alpha_bar_to_B)
    at, to = alpha_bar_t_B.double(), alpha_bar_to_B.double()
    step = 1 - at / to
    shrink, push = (to / at).sqrt(), step / (1 - at).sqrt()
    sigma = ((1 - to) / (1 - at) * step).sqrt()
    shape = (-1, *[1] * (noisy.ndim - 1))
    shrink, push, sigma = (value.to(noisy).reshape(shape) for value in (shrink, push, sigma))
    return shrink * (noisy - push * noise_estimate) + sigma * posterior_noise.to(noisy)


def ncp_statistics(
    features: Features,
    *,
    noisy: Tensor,
    policy_noise: Tensor,
    reference_noise: Tensor,
    noise: Tensor,
    step: NcpStep,
    posterior_noise: Tensor | None,
) -> ErrorStatistics:
    """Return the feature distances of policy and reference from the truth, as input of the preference losses.

    It runs three encoder passes, one of them with a graph; f(x*) is shared by both distances. Feature tensors (the
    encoder's stages) have equal weight, independent of their size.

    Args:
        features: f with its condition bound, frozen, in full float32.
        noisy: x_t.
        policy_noise: eps of the policy, with the graph (`to_noise` converts other prediction types).
        reference_noise: eps of the frozen base model on the same input.
        noise: noise of x_t.
        step: reverse step, result of `ncp_step`.
        posterior_noise: z of DDPM's posterior, or None for the deterministic DDIM step.
    """

    def look(estimate: Tensor) -> Sequence[Tensor]:
        state = reverse_state(noisy, estimate, step.alpha_bar_t_B, step.alpha_bar_to_B, posterior_noise)
        return features(state, step.timesteps_B)

    with torch.no_grad():
        target, reference = look(noise), look(reference_noise)
    stages = [error_statistics(*stage) for stage in zip(look(policy_noise), reference, target, strict=True)]
    return ErrorStatistics(
        cross_B=torch.stack([stage.cross_B for stage in stages]).mean(0),
        drift_B=torch.stack([stage.drift_B for stage in stages]).mean(0),
        reference_error_B=torch.stack([stage.reference_error_B for stage in stages]).mean(0),
    )
