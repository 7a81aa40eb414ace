"""Samplers by name, most of them diffusers schedulers on explicit trajectories, and trajectories for pipelines.

A diffusers scheduler can follow any trajectory if its step reads `sigmas` by index: its levels are overwritten. The
DDIM and PNDM schedulers compute the previous timestep from an even spacing, so overwriting their timesteps gives wrong
results without an error; `ddim` and `plms` are implemented in this package. The model's x_0 rule is applied to network
outputs before the sampler (`diffusion.clean_rule`), so schedulers are built without clipping or thresholding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from typing_extensions import override

from acpo_dist.core.errors import ConfigError
from acpo_dist.core.registry import nearest
from acpo_dist.diffusion.flow import flow_sigma
from acpo_dist.diffusion.plms import PLMS, noise_levels
from acpo_dist.diffusion.prediction import to_velocity
from acpo_dist.diffusion.sampling import DDIM, Predict, Sampler, Stepper, ddim_step
from acpo_dist.diffusion.trajectory import Trajectory

LEAST_LEVEL = 2.0**-24
"""Smallest alpha_bar of a scheduler that is built for its step only."""

UNSHIFTED: dict[str, Any] = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
"""Configuration with which the flow scheduler takes sigmas as they are."""

RESPACING_FLAGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)
"""Options of `DPMSolverMultistepScheduler` that replace the levels of explicit timesteps."""


@dataclass(frozen=True, kw_only=True)
class ScheduledSampler(Sampler):
    """A multistep or Euler scheduler of diffusers with the levels of a trajectory; each rollout creates a scheduler.

    The last step to a clean end is of first order, as in diffusers with `final_sigmas_type="zero"`. With fewer than 15
    steps diffusers also lowers the order of the steps before it (`lower_order_final`).
    """

    scheduler: type
    alpha_bars: Tensor
    """Of the model's training, by timestep, float64, shape (T,)."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    scaled: bool = False
    """Whether the scheduler's sample is z = x / sqrt(alpha_bar) instead of x."""
    clean_by_ddim: bool = False
    """Whether the step to a clean end is a DDIM step, because the scheduler's own step evaluates 0 times infinity."""

    @override
    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        sigmas = noise_levels(trajectory)
        final = "zero" if sigmas[-1] == 0 else "sigma_min"
        # Only DEIS lacks the option; it cannot step to sigma = 0 and uses `clean_by_ddim`.
        options = self.options if self.clean_by_ddim else {"final_sigmas_type": final, **self.options}
        kind, convert = _as_scheduled(prediction_type)
        scheduler = build_scheduler(self.scheduler, self.alpha_bars, kind, **options)
        write_levels(scheduler, sigmas, trajectory.timesteps)

        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            if self.clean_by_ddim and following == 1:
                return ddim_step(model_output, state, level, following, prediction_type)
            model_output = convert(model_output, state, level)
            if not self.scaled:
                return scheduler.step(model_output.float(), scheduler.timesteps[step], state).prev_sample
            return following**0.5 * _scaled_step(scheduler, step, model_output, state / level**0.5)

        return advance


@dataclass(frozen=True, kw_only=True)
class HeunSampler(Sampler):
    """Heun's method (second order) with diffusers' scheduler: two network calls per step, 2 N - 1 in total.

    The first call of a step is at the state passed to `visit`. The second call is at the Euler prediction of the next
    state with the next timestep; `visit` is not called for it. The last step is an Euler step, because its end has no
    timestep.
    """

    alpha_bars: Tensor
    """Of the model's training, by timestep, float64, shape (T,)."""

    @override
    def start(self, trajectory: Trajectory, prediction_type: str, predict: Predict) -> Stepper:
        kind, convert = _as_scheduled(prediction_type)
        scheduler = build_scheduler(HeunDiscreteScheduler, self.alpha_bars, kind)
        sigmas, timesteps = noise_levels(trajectory), trajectory.timesteps
        # The scheduler is called twice at every inner level: at the end of one step and at the start of the next.
        doubled = [sigma for sigma in sigmas[1:-1] for _ in range(2)]
        repeated = [timestep for timestep in timesteps[1:] for _ in range(2)]
        write_levels(scheduler, (sigmas[0], *doubled, sigmas[-1]), (timesteps[0], *repeated))

        def advance(step: int, model_output: Tensor, state: Tensor) -> Tensor:
            level, following = trajectory.alpha_bars[step : step + 2]
            model_output = convert(model_output, state, level)
            predicted = _scaled_step(scheduler, 2 * step, model_output, state / level**0.5)
            if step + 1 == trajectory.num_steps:
                return following**0.5 * predicted
            second = predict(step + 1, following**0.5 * predicted)
            second = convert(second, following**0.5 * predicted, following)
            return following**0.5 * _scaled_step(scheduler, 2 * step + 1, second, predicted)

        return advance


@dataclass(frozen=True, kw_only=True)
class SamplerEntry:
    """A sampler by name."""

    build: Callable[[Tensor], Sampler]
    """Creates the sampler from the model's alpha_bars, float64, shape (T,)."""
    calls_per_step: int
    """Network calls per denoise step; `heun` makes one call less in total."""


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
"""Samplers of `sampling.sample`. The schemes of `splitting.sample_split` need separate branches and are not listed."""


def make_sampler(name: str, alpha_bars_T: Tensor) -> Sampler:
    """Create a sampler by name.

    Args:
        name: a name in `SAMPLERS`.
        alpha_bars_T: cumulative signal fraction by timestep, float64, shape (T,).

    Raises:
        ConfigError: unknown name.
    """
    if name not in SAMPLERS:
        hint = " PNDM's step assumes even timesteps; `plms` is the same rule for any." if name == "pndm" else ""
        known = ", ".join(sorted(SAMPLERS))
        raise ConfigError(f"unknown sampler `{name}`.{hint or nearest(name, list(SAMPLERS))} Known: {known}.")
    return SAMPLERS[name].build(alpha_bars_T)


def _as_scheduled(prediction_type: str) -> tuple[str, Callable[[Tensor, Tensor, float], Tensor]]:
    """Return a diffusers prediction type, and the conversion (output, state, alpha_bar) -> output of that type.

    States have a^2 + s^2 = 1 for every model, so a flow model's output is passed to schedulers as a v-prediction.
    """
    if prediction_type != "flow_prediction":
        return prediction_type, lambda model_output, state, level: model_output

    def convert(model_output: Tensor, state: Tensor, level: float) -> Tensor:
        return to_velocity(model_output, state, torch.full((len(state),), level, dtype=torch.float64))

    return "v_prediction", convert


def build_scheduler(scheduler: type, alpha_bars_T: Tensor, prediction_type: str, **options: Any) -> Any:
    """Create a diffusers scheduler with the noise levels of a model.

    Args:
        scheduler: scheduler class.
        alpha_bars_T: alpha_bar by timestep, shape (T,); converted to betas.
        prediction_type: `epsilon`, `v_prediction` or `sample`.
        options: further arguments of the class.
    """
    levels = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars_T.detach().to("cpu", torch.float64)])
    # The scheduler's own levels are replaced, but must be finite: a flow model's last level is 0.
    levels = levels.clamp(min=LEAST_LEVEL)
    betas = (1 - levels[1:] / levels[:-1]).tolist()
    return scheduler(num_train_timesteps=len(betas), trained_betas=betas, prediction_type=prediction_type, **options)


def write_levels(scheduler: Any, sigmas: tuple[float, ...], timesteps: tuple[float, ...]) -> None:
    """Set the levels of a new scheduler whose step reads them by index.

    Args:
        scheduler: a scheduler without earlier steps.
        sigmas: N + 1 sigmas, decreasing.
        timesteps: N timesteps.
    """
    # `set_timesteps` also resets internal state; the levels that it computes are then replaced.
    scheduler.set_timesteps(len(timesteps))
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
    scheduler.timesteps = torch.tensor(timesteps, dtype=torch.float32)
    scheduler.num_inference_steps = len(timesteps)
    # Steps are counted by index, because a search by timestep fails for repeated timesteps.
    scheduler.set_begin_index(0)


def _scaled_step(scheduler: Any, index: int, model_output: Tensor, scaled: Tensor) -> Tensor:
    timestep = scheduler.timesteps[index]
    # The result is not used; Euler logs a warning if this method has not been called.
    scheduler.scale_model_input(scaled, timestep)
    return scheduler.step(model_output.float(), timestep, scaled).prev_sample


class UnetFlowScheduler(FlowMatchEulerDiscreteScheduler):
    """The flow scheduler with the two attributes that diffusers' U-Net pipelines read: for rectified-flow SDXL."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the sample: flow networks take their state unscaled."""
        return sample


def flow_line(trajectory: Trajectory) -> list[float]:
    """Convert a trajectory to N + 1 sigmas of a flow model, for ComfyUI's manual sigmas; the last one is the end."""
    return [flow_sigma(level) for level in trajectory.alpha_bars]


def euler_sigmas(trajectory: Trajectory) -> list[float]:
    """Convert a trajectory to the `sigmas` argument of `EulerDiscreteScheduler`.

    Returns:
        N + 1 sigmas including the end (0 if clean). Without the end diffusers omits the last step without a warning.
    """
    return list(noise_levels(trajectory))


def dpmpp_timesteps(trajectory: Trajectory) -> list[int]:
    """Convert a trajectory to the `timesteps` argument of `DPMSolverMultistepScheduler`.

    diffusers truncates non-integer timesteps, so they are rounded here; duplicates are moved to free timesteps.

    Returns:
        N strictly decreasing integers.

    Raises:
        ConfigError: more steps than integers from the first timestep down to 0.
    """
    whole = [round(timestep) for timestep in trajectory.timesteps]
    if whole[0] + 1 < len(whole):
        raise ConfigError(f"{len(whole)} steps from timestep {whole[0]} cannot all have their own integer timestep")
    for step in range(1, len(whole)):
        whole[step] = min(whole[step], whole[step - 1] - 1)
    # Moving down can give negative timesteps: repeat from the other end, which has room because of the check above.
    for step in reversed(range(len(whole))):
        whole[step] = max(whole[step], len(whole) - 1 - step)
    return whole


def pipeline_arguments(scheduler: Any, trajectory: Trajectory) -> dict[str, list[float] | list[int]]:
    """Create the argument with which a diffusers pipeline or `scheduler.set_timesteps` follows a trajectory.

    Args:
        scheduler: scheduler of the pipeline. Euler follows the trajectory exactly, DPM-Solver at integer timesteps.
        trajectory: the trajectory.

    Returns:
        `{"sigmas": ...}` or `{"timesteps": ...}`, to be passed instead of `num_inference_steps`.

    Raises:
        ConfigError: the scheduler cannot follow a trajectory, or an option of the scheduler would change it.
    """
    kind = type(scheduler).__name__
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        changing = {key: scheduler.config.get(key) for key, plain in UNSHIFTED.items()}
        if changing != UNSHIFTED or trajectory.alpha_bars[-1] != 1:
            raise ConfigError(
                f"{kind} would change the trajectory's sigmas again: it has {changing}, expected {UNSHIFTED}, and the "
                f"trajectory must end clean, found alpha_bar {trajectory.alpha_bars[-1]:g}. Create it with "
                "from_config(config, shift=1.0, use_dynamic_shifting=False, shift_terminal=None)."
            )
        return {"sigmas": flow_line(trajectory)[:-1]}
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
