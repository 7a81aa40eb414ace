"""Samplers by name, most of them diffusers' schedulers on explicit trajectories, and trajectories for pipelines.

A scheduler of diffusers can follow any trajectory if its step reads `sigmas` by index: its own spacing is overwritten.
DDIM and PNDM compute the previous timestep from an even spacing inside the step, so overwriting their timesteps is
silently wrong; `ddim` and `plms` here are our own. The model's x_0 rule acts on network outputs before they reach a
sampler (`diffusion.clean_rule`), so schedulers are built without clipping or thresholding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from typing_extensions import override

from acpo_dist.core.errors import ConfigError
from acpo_dist.core.registry import nearest
from acpo_dist.diffusion.plms import PLMS, noise_levels
from acpo_dist.diffusion.sampling import DDIM, Predict, Sampler, Stepper, ddim_step
from acpo_dist.diffusion.trajectory import Trajectory

RESPACING_FLAGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)
"""Options of `DPMSolverMultistepScheduler` that replace the levels of the timesteps it is given."""


@dataclass(frozen=True, kw_only=True)
class ScheduledSampler(Sampler):
    """A multistep or Euler scheduler of diffusers with the trajectory's levels written in; one object per rollout.

    The last step to a clean end is of first order, as diffusers itself does with `final_sigmas_type="zero"`; with fewer
    than 15 steps diffusers lowers the order near the end too (`lower_order_final`).
    """

    scheduler: type
    alpha_bars: Tensor
    """Of the model's training, by timestep, float64, shape (T,)."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    scaled: bool = False
    """Whether the scheduler's sample is z = x / sqrt(alpha_bar) instead of x."""
    clean_by_ddim: bool = False
    """Whether the step to a clean end is ours: the first-order rule where the scheduler's own is 0 times infinity."""

    @override
    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        sigmas = noise_levels(trajectory)
        final = "zero" if sigmas[-1] == 0 else "sigma_min"
        # Only DEIS lacks the option, and it alone cannot reach 0.
        options = self.options if self.clean_by_ddim else {"final_sigmas_type": final, **self.options}
        scheduler = build_scheduler(self.scheduler, self.alpha_bars, prediction_type, **options)
        write_levels(scheduler, sigmas, trajectory.timesteps)

        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            if self.clean_by_ddim and following == 1:
                return ddim_step(model_output, state, level, following, prediction_type)
            if not self.scaled:
                return scheduler.step(model_output.float(), scheduler.timesteps[step], state).prev_sample
            return following**0.5 * _scaled_step(scheduler, step, model_output, state / level**0.5)

        return advance


@dataclass(frozen=True, kw_only=True)
class HeunSampler(Sampler):
    """Heun's rule of second order, in diffusers' scheduler: two calls per step, one for the last; 2 N - 1 in all.

    The first call of a step is at the visited state; the second is at the Euler prediction of the next state with the
    next timestep, which no visitor sees. The last step is an Euler step: its end has no timestep.
    """

    alpha_bars: Tensor
    """Of the model's training, by timestep, float64, shape (T,)."""

    @override
    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        scheduler = build_scheduler(HeunDiscreteScheduler, self.alpha_bars, prediction_type)
        sigmas, timesteps = noise_levels(trajectory), trajectory.timesteps
        # Every inner level is a place where the scheduler is called twice: as an end, then as a start.
        doubled = [sigma for sigma in sigmas[1:-1] for _ in range(2)]
        repeated = [timestep for timestep in timesteps[1:] for _ in range(2)]
        write_levels(scheduler, (sigmas[0], *doubled, sigmas[-1]), (timesteps[0], *repeated))

        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            predicted = _scaled_step(scheduler, 2 * step, model_output, state / level**0.5)
            if step + 1 == trajectory.num_steps:
                return following**0.5 * predicted
            second = predict(step + 1, following**0.5 * predicted)
            return following**0.5 * _scaled_step(scheduler, 2 * step + 1, second, predicted)

        return advance


@dataclass(frozen=True, kw_only=True)
class SamplerEntry:
    """A sampler by name."""

    build: Callable[[Tensor], Sampler]
    """From the model's alpha_bars, float64 (T,), to a sampler for any of its trajectories."""
    calls_per_step: int
    """Network calls per denoise step; `heun` makes one less in all."""


def _solver(scheduler: type, *, scaled: bool = False, clean_by_ddim: bool = False, **options: Any) -> SamplerEntry:
    def build(alpha_bars: Tensor) -> Sampler:
        return ScheduledSampler(
            scheduler=scheduler, alpha_bars=alpha_bars, options=options, scaled=scaled, clean_by_ddim=clean_by_ddim
        )

    return SamplerEntry(build=build, calls_per_step=1)


SAMPLERS: dict[str, SamplerEntry] = {
    "ddim": SamplerEntry(build=lambda alpha_bars: DDIM(), calls_per_step=1),
    "plms": SamplerEntry(build=lambda alpha_bars: PLMS(), calls_per_step=1),
    "euler": _solver(EulerDiscreteScheduler, scaled=True),
    "heun": SamplerEntry(build=lambda alpha_bars: HeunSampler(alpha_bars=alpha_bars), calls_per_step=2),
    "dpmpp_2m": _solver(DPMSolverMultistepScheduler, solver_order=2),
    "dpmpp_3m": _solver(DPMSolverMultistepScheduler, solver_order=3),
    "deis": _solver(DEISMultistepScheduler, clean_by_ddim=True),
    "unipc": _solver(UniPCMultistepScheduler),
}
"""For `sampling.sample`. The schemes of `splitting.sample_split` need the branches apart and are not listed here."""


def make_sampler(name: str, alpha_bars_T: Tensor) -> Sampler:
    """The sampler of that name for a model.

    Args:
        alpha_bars_T: cumulative signal fraction by timestep, float64, shape (T,).

    Raises:
        ConfigError: unknown name.
    """
    if name not in SAMPLERS:
        hint = " PNDM's step assumes even timesteps; `plms` is the same rule for any." if name == "pndm" else ""
        known = ", ".join(sorted(SAMPLERS))
        raise ConfigError(f"unknown sampler `{name}`.{hint or nearest(name, list(SAMPLERS))} Known: {known}.")
    return SAMPLERS[name].build(alpha_bars_T)


def build_scheduler(scheduler: type, alpha_bars_T: Tensor, prediction_type: str, **options: Any) -> Any:
    """A scheduler of diffusers for a model's training levels, given as betas."""
    levels = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars_T.detach().to("cpu", torch.float64)])
    betas = (1 - levels[1:] / levels[:-1]).tolist()
    return scheduler(num_train_timesteps=len(betas), trained_betas=betas, prediction_type=prediction_type, **options)


def write_levels(scheduler: Any, sigmas: tuple[float, ...], timesteps: tuple[float, ...]) -> None:
    """Replace the levels of a fresh scheduler whose step reads them by index; one more sigma than timesteps."""
    # Its own spacing first, for the state that `set_timesteps` also resets; what it worked out is then replaced.
    scheduler.set_timesteps(len(timesteps))
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
    scheduler.timesteps = torch.tensor(timesteps, dtype=torch.float32)
    scheduler.num_inference_steps = len(timesteps)
    # By position: a search by timestep would stumble over repeated ones.
    scheduler.set_begin_index(0)


def _scaled_step(scheduler: Any, index: int, model_output: Tensor, scaled: Tensor) -> Tensor:
    timestep = scheduler.timesteps[index]
    # Its result is the network's input, which we have; Euler only warns unless it was called.
    scheduler.scale_model_input(scaled, timestep)
    return scheduler.step(model_output.float(), timestep, scaled).prev_sample


def euler_sigmas(trajectory: Trajectory) -> list[float]:
    """`sigmas=` for `EulerDiscreteScheduler`: N + 1 values, including the last (0 if the end is clean).

    Without the last one diffusers ends at the last real level and silently drops a step.
    """
    return list(noise_levels(trajectory))


def dpmpp_timesteps(trajectory: Trajectory) -> list[int]:
    """`timesteps=` for `DPMSolverMultistepScheduler`: N integers, strictly decreasing, nearest to the trajectory's.

    diffusers truncates what is not an integer, so they are rounded here; equal ones are moved apart.

    Raises:
        ConfigError: more steps than integers from the first timestep down to 0.
    """
    whole = [round(timestep) for timestep in trajectory.timesteps]
    if whole[0] + 1 < len(whole):
        raise ConfigError(f"{len(whole)} steps from timestep {whole[0]} cannot all have their own integer timestep")
    for step in range(1, len(whole)):
        whole[step] = min(whole[step], whole[step - 1] - 1)
    # Moving down may have left the range; the same from the other end, where there is room by the check above.
    for step in reversed(range(len(whole))):
        whole[step] = max(whole[step], len(whole) - 1 - step)
    return whole


def pipeline_arguments(scheduler: Any, trajectory: Trajectory) -> dict[str, list[float] | list[int]]:
    """Argument that makes a plain diffusers pipeline, or its scheduler's `set_timesteps`, follow a trajectory.

    Args:
        scheduler: the pipeline's; Euler follows exactly, DPM-Solver to the nearest integer timesteps.

    Returns:
        `{"sigmas": ...}` or `{"timesteps": ...}`, to be passed instead of `num_inference_steps`.

    Raises:
        ConfigError: the scheduler cannot follow a trajectory, or has an option on that would change it.
    """
    kind = type(scheduler).__name__
    if not isinstance(scheduler, EulerDiscreteScheduler | DPMSolverMultistepScheduler):
        raise ConfigError(
            f"{kind} cannot follow an explicit trajectory in a pipeline: DDIM and PNDM assume evenly spaced timesteps "
            "in their step, others take no levels. Use EulerDiscreteScheduler (equal to DDIM on the same levels) or "
            "DPMSolverMultistepScheduler."
        )
    if isinstance(scheduler, EulerDiscreteScheduler):
        return {"sigmas": euler_sigmas(trajectory)}
    active = [flag for flag in RESPACING_FLAGS if scheduler.config.get(flag)]
    if active:
        raise ConfigError(f"{kind} would change the trajectory's levels: turn off {', '.join(active)}")
    if trajectory.alpha_bars[-1] != 1 or scheduler.config.get("final_sigmas_type") != "zero":
        raise ConfigError(
            f"{kind} takes no end from a trajectory: the trajectory must end at alpha_bar 1, found "
            f"{trajectory.alpha_bars[-1]:g}, and final_sigmas_type must be zero, found "
            f"{scheduler.config.get('final_sigmas_type')}"
        )
    return {"timesteps": dpmpp_timesteps(trajectory)}
