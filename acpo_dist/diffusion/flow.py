"""Levels of flow models, x = (1 - sigma) x_0 + sigma eps, in the coordinates of `diffusion.prediction`."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from acpo_dist.diffusion.prediction import flow_scale
from acpo_dist.diffusion.trajectory import Trajectory


def flow_alpha_bar(sigma: float) -> float:
    """Return alpha_bar = a^2 / (a^2 + s^2) at a = 1 - sigma, s = sigma; 0 at sigma = 1."""
    return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)


def flow_sigma(alpha_bar: float) -> float:
    """Return sigma = s / (a + s), the inverse of `flow_alpha_bar`."""
    signal, spread = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    return spread / (signal + spread)


def flow_alpha_bars(num_train_timesteps: int) -> Tensor:
    """Return alpha_bar by timestep t = 0..T-1 at sigma = (t + 1) / T, float64 (T,); the last one is 0.

    A timestep is T sigma - 1, so that -1 is clean, as after the last step of every trajectory.
    """
    sigmas = (np.arange(num_train_timesteps) + 1.0) / num_train_timesteps
    return torch.tensor([flow_alpha_bar(float(sigma)) for sigma in sigmas], dtype=torch.float64)


def shifted(sigma: float, shift: float) -> float:
    """Return shift sigma / (1 + (shift - 1) sigma); shifts above 1 spend more steps at high noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_trajectory(sigmas: Sequence[float], num_train_timesteps: int) -> Trajectory:
    """Create a trajectory from sigmas.

    Args:
        sigmas: N + 1 decreasing values in [0, 1] with the end; 0 is clean.
        num_train_timesteps: T.

    Raises:
        ValueError: sigmas are outside [0, 1] or do not decrease.
    """
    if not all(0 <= sigma <= 1 for sigma in sigmas):
        raise ValueError(f"sigmas of a flow model must lie in [0, 1]; found {list(sigmas)}")
    # T sigma is rounded to float32, so that t + 1 gives the same float32 number back in the model.
    timesteps = tuple(float(np.float32(sigma * num_train_timesteps)) - 1 for sigma in sigmas[:-1])
    return Trajectory(timesteps=timesteps, alpha_bars=tuple(flow_alpha_bar(sigma) for sigma in sigmas))


def flow_grpo_step(
    model_output: Tensor, noisy: Tensor, alpha_bar_t_B: Tensor, alpha_bar_prev_B: Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Return the Gaussian of Flow-GRPO's step, an Euler-Maruyama step of the flow's reverse SDE.

    With dt = sigma_prev - sigma_t and g = noise_level sqrt(sigma_t / (1 - sigma_t)), the flow model's state has mean
    x + (v + g^2 / (2 sigma_t) (x + (1 - sigma_t) v)) dt and standard deviation g sqrt(-dt). At sigma_t = 1, g takes
    sigma_prev in its denominator, as in the published code.

    Args:
        model_output: v at x_t, shape (B, ...).
        noisy: x_t with a^2 + s^2 = 1, same shape.
        alpha_bar_t_B: level before the step, in [0, 1).
        alpha_bar_prev_B: level after it, in (alpha_bar_t, 1).
        noise_level: a, > 0.

    Returns:
        Mean (B, ...) and standard deviation (B,) of x at alpha_bar_prev, with a^2 + s^2 = 1.

    Source: Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), eq. 9.
    """
    sigma, following = _sigmas(alpha_bar_t_B), _sigmas(alpha_bar_prev_B)
    step = following - sigma
    diffusion = noise_level**2 * sigma / (1 - torch.where(sigma < 1, sigma, following))
    drift = diffusion / (2 * sigma)
    scale = flow_scale(alpha_bar_t_B, noisy)
    # The next state is divided by its own c, as every stored state is.
    next_scale = flow_scale(alpha_bar_prev_B, noisy)

    def shaped(values_B: Tensor) -> Tensor:
        return values_B.to(device=noisy.device, dtype=scale.dtype).reshape(scale.shape)

    mean = scale * noisy * shaped(1 + drift * step) + model_output * shaped((1 + drift * (1 - sigma)) * step)
    std_B = shaped((-diffusion * step).sqrt()) / next_scale
    return mean / next_scale, std_B.flatten()


def _sigmas(alpha_bar_B: Tensor) -> Tensor:
    """Return sigma = s / (a + s) per level, float64."""
    wide = alpha_bar_B.double()
    return (1 - wide).sqrt() / (wide.sqrt() + (1 - wide).sqrt())


def flow_inputs(noisy: Tensor, timesteps_B: Tensor, num_train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Return the input of a flow network: its own state x = c x_t, and T sigma.

    Args:
        noisy: x_t with a^2 + s^2 = 1, shape (B, ...).
        timesteps_B: T sigma - 1 per sample.
        num_train_timesteps: T.

    Returns:
        (x of the shape and data type of `noisy`, T sigma (B,)).
    """
    at = timesteps_B + 1
    sigma = at.double() / num_train_timesteps
    scale = ((1 - sigma).square() + sigma.square()).sqrt()
    return scale.to(noisy).reshape(-1, *[1] * (noisy.ndim - 1)) * noisy, at
