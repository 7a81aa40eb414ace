"""One reverse step, guidance, and sampling along an explicit trajectory."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from acpo_dist.diffusion.clean_rule import NO_RULE, CleanRule
from acpo_dist.diffusion.prediction import to_clean, to_noise
from acpo_dist.diffusion.trajectory import Trajectory

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t of shape (B, ...), timesteps (B,)) -> network output of the same shape."""
Predict = Callable[[int, Tensor], Tensor]
"""(denoise_step, x_t) -> network output at the step's timestep, after the model's x_0 rule."""
Visit = Callable[[int, Tensor], None]
"""(denoise_step, x_t before the step) -> None."""
Stepper = Callable[[int, Tensor, Tensor], Tensor]
"""(denoise_step, network output, x_t) -> x at the next level. Belongs to one trajectory; called in order, from 0."""


class Sampler(Protocol):
    """A rule that turns network outputs into steps. It is stateless; its steppers may keep a history."""

    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        """Begin to sample along a trajectory.

        Args:
            trajectory: levels of all steps.
            prediction_type: what the network predicts.
            predict: the network, for rules that evaluate it more than once per step; no visitor sees those states.

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
        model_output: network output at alpha_bar_t, after the model's x_0 rule, shape (B, ...).
        noisy: x_t, same shape.
        alpha_bar_t: level of `noisy`, in (0, 1).
        alpha_bar_prev: level after the step, above alpha_bar_t.
        prediction_type: what the network predicts.
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
class DDIM(Sampler):
    """Deterministic DDIM, first order: the Euler step of dz/dsigma = eps, z = x / sqrt(alpha_bar)."""

    @override
    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            return ddim_step(model_output, state, level, following, prediction_type)

        return advance


@dataclass(frozen=True)
class StochasticDDIM(Sampler):
    """DDIM with eta > 0: every step adds noise and has a density, except one that ends at a clean sample."""

    eta: float
    noise: Callable[[int], Tensor]
    """Denoise step -> noise of the state's shape."""

    @override
    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            return ddim_step(
                model_output, state, level, following, prediction_type, eta=self.eta, noise=self.noise(step)
            )

        return advance


DEFAULT_SAMPLER = DDIM()


def sample(
    denoise: Denoise, start: Tensor, trajectory: Trajectory, prediction_type: str,
    *, visit: Visit | None = None, sampler: Sampler = DEFAULT_SAMPLER, rule: CleanRule = NO_RULE,
) -> Tensor:  # fmt: skip
    """Sample along the whole trajectory and return x at its end.

    The network is called once per denoise step, at the state that `visit` sees. Only samplers that say so call it more.

    Args:
        denoise: the network, guided if the sampler is guided.
        start: unit Gaussian noise, shape (B, ...); computed in float32, or in float64 if `start` is.
        trajectory: levels of all steps.
        prediction_type: what the network predicts.
        visit: called before every step.
        sampler: rule of a step.
        rule: what the model's scheduler does to x0-hat.

    Returns:
        Same shape as `start`.
    """
    state = start if start.dtype == torch.float64 else start.float()

    def predict(step: int, noisy: Tensor) -> Tensor:
        model_output = denoise(noisy, torch.full((noisy.shape[0],), trajectory.timesteps[step], device=noisy.device))
        levels = torch.full((noisy.shape[0],), trajectory.alpha_bars[step], dtype=torch.float64, device=noisy.device)
        return rule.apply(model_output, noisy, levels, prediction_type)

    advance = sampler.start(trajectory, prediction_type, predict)
    for step in range(trajectory.num_steps):
        if visit is not None:
            visit(step, state)
        state = advance(step, predict(step, state), state)
    return state


def keep_states(steps: Collection[int], store: dict[int, Tensor]) -> Visit:
    """A visitor that puts copies of the states at the given denoise steps into `store`, by step."""

    def visit(step: int, state: Tensor) -> None:
        if step in steps:
            store[step] = state.detach().clone()

    return visit
