"""DDIM steps, classifier-free guidance, and sampling along an explicit trajectory."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from acpo_dist.diffusion.clean_rule import NO_RULE, CleanRule
from acpo_dist.diffusion.flow import flow_grpo_step
from acpo_dist.diffusion.prediction import to_clean, to_noise
from acpo_dist.diffusion.trajectory import Trajectory

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t of shape (B, ...), timesteps (B,)) -> network output of the same shape."""
Predict = Callable[[int, Tensor], Tensor]
"""(denoise_step, x_t) -> network output at the step's timestep, after the model's x_0 rule."""
Visit = Callable[[int, Tensor], None]
"""(denoise_step, x_t before the step) -> None."""
Stepper = Callable[[int, Tensor, Tensor], Tensor]
"""(denoise_step, network output, x_t) -> x at the next level. Used for one trajectory; steps are in order from 0."""


class Sampler(Protocol):
    """A stateless sampler; the steppers that it creates can have state."""

    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        """Create a stepper for one trajectory.

        Args:
            trajectory: noise levels of all steps.
            prediction_type: a name in `prediction.PREDICTION_TYPES`.
            predict: the network, for samplers with more than one call per step. `visit` is not called for these states.

        Returns:
            The stepper.

        Raises:
            ValueError: unknown prediction type; raised here or at the first step.
        """
        ...


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance: eps_u + w (eps_c - eps_u), optionally rescaled.

    Args:
        conditional: network output of the conditional branch.
        unconditional: network output of the unconditional branch, same shape.
        guidance_scale: w.
        rescale: phi in [0, 1]; the share of the guided output whose standard deviation per sample is set to that of the
            conditional output.

    Returns:
        Guided network output, same shape.

    Source: Ho and Salimans 2022; for `rescale` Lin et al. 2023 (Common Diffusion Noise Schedules), section 3.4.
    """
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (1 - rescale + rescale * ratio)


def ddim_step(
    model_output: Tensor, noisy: Tensor, alpha_bar_t: float, alpha_bar_prev: float, prediction_type: str,
    *, eta: float = 0.0, noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One DDIM step between two explicit noise levels.

    Args:
        model_output: network output at alpha_bar_t, after the model's x_0 rule, shape (B, ...).
        noisy: x_t, same shape.
        alpha_bar_t: alpha_bar of `noisy`, in (0, 1); 0 is allowed for velocity predictions.
        alpha_bar_prev: alpha_bar after the step, above alpha_bar_t.
        prediction_type: a name in `prediction.PREDICTION_TYPES`.
        eta: amount of noise; 0 is deterministic.
        noise: unit Gaussian noise of the same shape; required if eta > 0.

    Returns:
        x at alpha_bar_prev, same shape, float32 or float64.

    Raises:
        ValueError: eta > 0 without noise, or unknown prediction type.

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
    """Deterministic DDIM, first order: Euler's method on dz/dsigma = eps with z = x / sqrt(alpha_bar)."""

    @override
    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            return ddim_step(model_output, state, level, following, prediction_type)

        return advance


@dataclass(frozen=True)
class StochasticSampler(Sampler):
    """A sampler whose steps add noise and have a density, except a step to a clean sample."""

    level: float
    """Amount of noise (`sampler.eta`), > 0."""
    noise: Callable[[int], Tensor]
    """Denoise step -> noise of the state's shape."""


class StochasticDDIM(StochasticSampler):
    """DDIM with eta > 0, which is `level`."""

    @override
    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            return ddim_step(
                model_output, state, level, following, prediction_type, eta=self.level, noise=self.noise(step)
            )

        return advance


class FlowGrpo(StochasticSampler):
    """Flow-GRPO's steps for flow models; `level` is the paper's a. A step to a clean sample is Euler's step."""

    @override
    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        if prediction_type != "flow_prediction":
            raise ValueError(f"Flow-GRPO's step needs flow_prediction, found {prediction_type}")

        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            if following >= 1:
                return ddim_step(model_output, state, level, following, prediction_type)
            before, after = (torch.full((len(state),), value, dtype=torch.float64) for value in (level, following))
            mean, std_B = flow_grpo_step(model_output, state, before, after, self.level)
            return mean + std_B.reshape(-1, *[1] * (state.ndim - 1)) * self.noise(step)

        return advance


STOCHASTIC: dict[str, type[StochasticSampler]] = {"ddim": StochasticDDIM, "flow_grpo": FlowGrpo}
"""Stochastic samplers by `sampler.stochastic_step`."""

DEFAULT_SAMPLER = DDIM()


def start_exactly(sampler: Sampler, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
    """Create a stepper for a trajectory that can start without signal (alpha_bar 0).

    Solvers work in z = x / sqrt(alpha_bar), which is infinite there. The first step is then a DDIM step, which is
    exact in eps because x is eps, and the solver starts at the second level.
    """
    if trajectory.alpha_bars[0] > 0 or isinstance(sampler, StochasticSampler):
        return sampler.start(trajectory, prediction_type, predict)
    level, following = trajectory.alpha_bars[:2]
    rest: Stepper | None = None
    if trajectory.num_steps > 1:
        later = Trajectory(timesteps=trajectory.timesteps[1:], alpha_bars=trajectory.alpha_bars[1:])
        rest = sampler.start(later, prediction_type, lambda step, noisy: predict(step + 1, noisy))

    def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
        if step == 0 or rest is None:
            return ddim_step(model_output, state, level, following, prediction_type)
        return rest(step - 1, model_output, state)

    return advance


def sample(
    denoise: Denoise, start: Tensor, trajectory: Trajectory, prediction_type: str,
    *, visit: Visit | None = None, sampler: Sampler = DEFAULT_SAMPLER, rule: CleanRule = NO_RULE,
) -> Tensor:  # fmt: skip
    """Sample along a trajectory.

    The network is called once per denoise step at the state that is passed to `visit`; some samplers, such as Heun,
    make additional calls.

    Args:
        denoise: the network, including guidance.
        start: unit Gaussian noise, shape (B, ...). States are float64 if `start` is float64, otherwise float32.
        trajectory: noise levels of all steps.
        prediction_type: a name in `prediction.PREDICTION_TYPES`.
        visit: called before every step.
        sampler: the sampler.
        rule: the x_0 rule of the model's scheduler.

    Returns:
        x at the end of the trajectory, same shape as `start`.
    """
    state = start if start.dtype == torch.float64 else start.float()

    def predict(step: int, noisy: Tensor) -> Tensor:
        model_output = denoise(noisy, torch.full((noisy.shape[0],), trajectory.timesteps[step], device=noisy.device))
        levels = torch.full((noisy.shape[0],), trajectory.alpha_bars[step], dtype=torch.float64, device=noisy.device)
        return rule.apply(model_output, noisy, levels, prediction_type)

    advance = start_exactly(sampler, trajectory, prediction_type, predict)
    for step in range(trajectory.num_steps):
        if visit is not None:
            visit(step, state)
        state = advance(step, predict(step, state), state)
    return state


def keep_states(steps: Collection[int], store: dict[int, Tensor]) -> Visit:
    """Create a `visit` callback that stores copies of states.

    Args:
        steps: denoise steps to store.
        store: receives the states by denoise step.
    """

    def visit(step: int, state: Tensor) -> None:
        if step in steps:
            store[step] = state.detach().clone()

    return visit
