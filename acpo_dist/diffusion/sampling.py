"""One reverse step, guidance, and the walk along an explicit trajectory."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from acpo_dist.diffusion.prediction import to_clean, to_noise
from acpo_dist.diffusion.trajectory import Trajectory

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t of shape (B, ...), timesteps (B,)) -> network output of the same shape."""
Visit = Callable[[int, Tensor], None]
"""(denoise_step, x_t before the step) -> None."""
Stepper = Callable[[int, Tensor, Tensor], Tensor]
"""(denoise_step, network output, x_t) -> x at the next level. Belongs to one walk and is called in order, from 0."""


class Sampler(Protocol):
    """A rule that turns network outputs into steps; it keeps nothing between walks, its steppers may."""

    def start(self, trajectory: Trajectory, prediction_type: str, denoise: Denoise) -> Stepper:
        """Begin one walk.

        Args:
            denoise: for rules that ask the network again within a step, at states that no visitor sees.

        Raises:
            ValueError: unknown prediction type, at the latest at the first step.
        """
        ...


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: eps_u + w (eps_c - eps_u). Source: Ho and Salimans 2022."""
    return unconditional + guidance_scale * (conditional - unconditional)


def ddim_step(
    model_output: Tensor, noisy: Tensor, alpha_bar_t: float, alpha_bar_prev: float, prediction_type: str,
    *, eta: float = 0.0, noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """From alpha_bar_t to alpha_bar_prev, both given: non-uniform trajectories need no timestep arithmetic.

    Args:
        head: network output at alpha_bar_t.
        noisy: x_t.
        eta: 0 is deterministic; above it `noise` must be given.

    Returns:
        x at alpha_bar_prev, float32 or wider.

    Raises:
        ValueError: eta > 0 without noise.

    Source: DDIM (Song et al. 2021), eq. 12 and 16.
    """
    levels = torch.full((noisy.shape[0],), alpha_bar_t, dtype=torch.float64, device=noisy.device)
    clean = to_clean(model_output, noisy, levels, prediction_type)
    direction = to_noise(model_output, noisy, levels, prediction_type)
    variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    previous = alpha_bar_prev**0.5 * clean + max(0.0, 1 - alpha_bar_prev - variance) ** 0.5 * direction
    if eta > 0:
        if noise is None:
            raise ValueError("eta > 0 needs the noise of the step")
        previous = previous + variance**0.5 * noise
    return previous


@dataclass(frozen=True)
class DDIM:
    """Deterministic DDIM, first order: the Euler step of dz/dsigma = eps, z = x / sqrt(alpha_bar)."""

    def start(self, trajectory: Trajectory, prediction_type: str, denoise: Denoise) -> Stepper:
        """See `Sampler.start`."""

        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            return ddim_step(model_output, state, level, following, prediction_type)

        return advance


@dataclass(frozen=True)
class StochasticDDIM:
    """DDIM with eta > 0: every step but one that ends clean adds noise, and so has a density."""

    eta: float
    noise: Callable[[int], Tensor]
    """Denoise step -> noise of the state's shape."""

    def start(self, trajectory: Trajectory, prediction_type: str, denoise: Denoise) -> Stepper:
        """See `Sampler.start`."""

        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            return ddim_step(
                model_output, state, level, following, prediction_type, eta=self.eta, noise=self.noise(step)
            )

        return advance


DEFAULT_SAMPLER = DDIM()


def sample(
    denoise: Denoise, start: Tensor, trajectory: Trajectory, prediction_type: str,
    *, visit: Visit | None = None, sampler: Sampler = DEFAULT_SAMPLER,
) -> Tensor:  # fmt: skip
    """Walk the whole trajectory from `start` (unit Gaussian noise) and return x at its end.

    The network is called once per denoise step, at the state that `visit` sees. Only samplers that say so call it more.
    """
    state = start.float()
    advance = sampler.start(trajectory, prediction_type, denoise)
    for step, timestep in enumerate(trajectory.timesteps):
        if visit is not None:
            visit(step, state)
        model_output = denoise(state, torch.full((state.shape[0],), timestep, device=state.device))
        state = advance(step, model_output, state)
    return state


def keep_states(steps: Collection[int], store: dict[int, Tensor]) -> Visit:
    """A visitor that keeps copies of the states at the given denoise steps."""

    def visit(step: int, state: Tensor) -> None:
        if step in steps:
            store[step] = state.detach().clone()

    return visit
