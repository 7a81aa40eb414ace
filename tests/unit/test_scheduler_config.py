"""Every key of a supported scheduler's configuration is applied, replaced by a named key of the run, or rejected."""

import inspect
import logging
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from acpo_dist.core.errors import ConfigError, ModelError
from acpo_dist.diffusion.clean_rule import CleanRule
from acpo_dist.diffusion.plms import noise_levels
from acpo_dist.diffusion.sampling import DDIM, StochasticDDIM, sample
from acpo_dist.models.noise_levels import OBEYED, SPACED, SPACING, STEPPING, NoiseSchedule, build, schedule_of
from acpo_dist.models.schedulers import make_sampler

STEPS = 10
SOLVERS = {
    "DDPMScheduler": "stochastic", "DDIMScheduler": "ddim", "PNDMScheduler": "ddim", "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun", "DPMSolverMultistepScheduler": "dpmpp_2m", "DEISMultistepScheduler": "deis",
    "UniPCMultistepScheduler": "unipc",
}  # fmt: skip
VALUES: dict[str, list[dict[str, Any]]] = {
    "num_train_timesteps": [{"num_train_timesteps": 500}],
    "beta_start": [{"beta_start": 0.0003}],
    "beta_end": [{"beta_end": 0.013}],
    "beta_schedule": [{"beta_schedule": "scaled_linear"}],
    "trained_betas": [{"trained_betas": torch.linspace(2e-4, 0.03, 1000).tolist()}],
    "rescale_betas_zero_snr": [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}],
    "prediction_type": [{"prediction_type": "v_prediction"}, {"prediction_type": "sample"}],
    "clip_sample": [{"clip_sample": False}, {"clip_sample": True}],
    "clip_sample_range": [{"clip_sample": True, "clip_sample_range": 0.6}],
    "thresholding": [{"thresholding": True}],
    "dynamic_thresholding_ratio": [{"thresholding": True, "dynamic_thresholding_ratio": 0.8}],
    "sample_max_value": [{"thresholding": True, "sample_max_value": 1.7}],
    "timestep_spacing": [{"timestep_spacing": name} for name in ("leading", "trailing", "linspace")],
    "steps_offset": [{"timestep_spacing": "leading", "steps_offset": 1}],
    "set_alpha_to_one": [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}],
    "final_sigmas_type": [{"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}],
    "use_karras_sigmas": [{"use_karras_sigmas": True}],
    "use_exponential_sigmas": [{"use_exponential_sigmas": True}],
    "use_beta_sigmas": [{"use_beta_sigmas": True}],
    "use_lu_lambdas": [{"use_lu_lambdas": True}],
    "sigma_min": [{"use_karras_sigmas": True, "sigma_min": 0.1}],
    "sigma_max": [{"use_karras_sigmas": True, "sigma_max": 50.0}],
    "interpolation_type": [{"interpolation_type": "log_linear"}],
    "lambda_min_clipped": [{"lambda_min_clipped": -4.0}],
    "solver_order": [{"solver_order": 3}],
    "solver_type": [{"solver_type": "heun"}],
    "algorithm_type": [{"algorithm_type": "sde-dpmsolver++"}],
    "lower_order_final": [{"lower_order_final": False}],
    "euler_at_final": [{"euler_at_final": True}],
    "predict_x0": [{"predict_x0": False}],
    "disable_corrector": [{"disable_corrector": [0]}],
    "solver_p": [{"solver_p": None}],
    "skip_prk_steps": [{"skip_prk_steps": True}],
    "variance_type": [{"variance_type": "fixed_large"}],
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "use_flow_sigmas": True, "flow_shift": 3.0, "use_dynamic_shifting": True, "shift_terminal": 0.1,
    "time_shift_type": "linear", "timestep_type": "continuous", "prediction_type": "flow_prediction",
    "variance_type": "learned_range",
}  # fmt: skip


def keys_of(kind: str) -> list[str]:
    return [name for name in inspect.signature(getattr(diffusers, kind).__init__).parameters if name != "self"]


CASES = [
    pytest.param(kind, values, id=f"{kind}-{'-'.join(f'{k}={v}'[:40] for k, v in values.items())}")
    for kind in SPACED
    for key in keys_of(kind)
    for values in VALUES.get(key, [])
    if key in OBEYED | SPACING
    and set(values) <= set(keys_of(kind))
    # PNDM has no `sample` prediction, and averages v of different timesteps, which belongs to its step.
    and not (kind == "PNDMScheduler" and "prediction_type" in values)
]


def configured(kind: str, values: dict[str, Any]) -> tuple[dict[str, Any], NoiseSchedule]:
    # PNDM's Runge-Kutta start follows no trajectory; every published folder switches it off.
    values = {"skip_prk_steps": True, **values} if kind == "PNDMScheduler" else values
    return values, schedule_of({"_class_name": kind, **values}, "folder")


def network(state: Tensor, timesteps: Tensor) -> Tensor:
    when = timesteps.to(state.dtype).reshape(-1, 1, 1, 1) / 1000
    return torch.sin(2 * state + 3 * when) - 0.5 * torch.cos(state.roll(1, dims=-1)) * when


def noise(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def constant_noise(schedule: NoiseSchedule, state: Tensor, timestep: float) -> Tensor:
    """A network that predicts a constant eps: PNDM's multistep mean is then that eps, and its step is DDIM's."""
    level, eps = float(schedule.alpha_bars[int(timestep)]), noise(7, state.dtype)
    clean = (state - (1 - level) ** 0.5 * eps) / level**0.5
    velocity = level**0.5 * eps - (1 - level) ** 0.5 * clean
    return {"epsilon": eps, "v_prediction": velocity, "sample": clean}[schedule.prediction_type]


def plain(kind: str, values: dict[str, Any], schedule: NoiseSchedule, start: Tensor) -> Tensor:
    """The loop of a diffusers pipeline under this configuration, in x; float64 where the scheduler's step allows it."""
    scheduler = build(kind, values)
    scheduler.set_timesteps(STEPS)
    if kind in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"):
        # The same levels in float64; a level of zero is 2^-24 here.
        scheduler.alphas_cumprod = schedule.alpha_bars
        if kind != "DDPMScheduler":
            scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    state, generator = start, torch.Generator().manual_seed(3)
    if kind in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        state = start * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for timestep in scheduler.timesteps:
        if kind == "PNDMScheduler":
            state = scheduler.step(constant_noise(schedule, state, timestep), timestep, state).prev_sample
            continue
        model_output = network(scheduler.scale_model_input(state, timestep), timestep.expand(len(state)))
        options = {"DDIMScheduler": {"use_clipped_model_output": True}, "DDPMScheduler": {"generator": generator}}
        state = scheduler.step(model_output, timestep, state, **options.get(kind, {})).prev_sample
    end = (
        scheduler.sigmas[len(scheduler.timesteps)]
        if kind in ("EulerDiscreteScheduler", "HeunDiscreteScheduler")
        else torch.zeros(())
    )
    return state / (end**2 + 1) ** 0.5


def ours(kind: str, schedule: NoiseSchedule, start: Tensor) -> Tensor:
    trajectory = schedule.trajectory(STEPS, "scheduler")
    name, generator = SOLVERS[kind], torch.Generator().manual_seed(3)
    draws = [torch.randn(start.shape, generator=generator, dtype=start.dtype) for _ in range(STEPS)]
    sampler = DDIM() if name == "ddim" else None
    if name == "stochastic":
        sampler = StochasticDDIM(1.0, lambda step: draws[step])
    if sampler is None:
        sampler = make_sampler(name, schedule.alpha_bars)
    denoise = network
    if kind == "PNDMScheduler":
        denoise = lambda state, timesteps: constant_noise(schedule, state, float(timesteps[0]))  # noqa: E731
    return sample(denoise, start, trajectory, schedule.prediction_type, sampler=sampler, rule=schedule.rule)


@pytest.mark.parametrize("kind", SPACED)
def test_every_key_of_a_supported_scheduler_has_a_case(kind: str):
    tested = set(VALUES) | set(REFUSED)
    assert set(keys_of(kind)) <= tested
    assert set(VALUES) <= OBEYED | SPACING | STEPPING


@pytest.mark.parametrize(("kind", "values"), CASES)
def test_a_rollout_is_diffusers_own_under_every_key(kind: str, values: dict[str, Any]):
    values, schedule = configured(kind, values)
    exact = kind in ("DDPMScheduler", "DDIMScheduler")
    try:
        found = ours(kind, schedule, noise(0, torch.float64 if exact else torch.float32))
    except ConfigError as error:
        refused = {
            ("DDIMScheduler", "linspace"), ("PNDMScheduler", "linspace"), ("DEISMultistepScheduler", None),
        }  # fmt: skip
        spaced = values.get("timestep_spacing")
        assert (kind, spaced) in refused and "sampler.spacing" in str(error)
        # DEIS repeats its last sigma under these keys, which is a step of no length.
        assert spaced or any(key.startswith("use_") for key in values)
        return
    expected = plain(kind, values, schedule, noise(0, torch.float64 if exact else torch.float32))
    # float64; or float32 at sigma 157, and 4096 under zero terminal SNR, times a network slope of 2 per step.
    bound = 1e-9 if exact else 5e-3 if values.get("rescale_betas_zero_snr") else 5e-4
    assert float((found - expected).abs().max()) < bound * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", SPACED)
@pytest.mark.parametrize("key", sorted(STEPPING))
def test_keys_of_the_step_are_replaced_and_logged(kind: str, key: str, caplog: pytest.LogCaptureFixture):
    # DEIS accepts the names of DPM-Solver, and DPM-Solver itself only its ++ forms at a clean end.
    for values in [{key: "dpmsolver"}] if (kind, key) == ("DEISMultistepScheduler", "algorithm_type") else VALUES[key]:
        if (
            key not in keys_of(kind)
            or values[key] == inspect.signature(getattr(diffusers, kind)).parameters[key].default
        ):
            continue
        with caplog.at_level(logging.INFO):
            schedule = schedule_of({"_class_name": kind, **values}, "folder")
        assert torch.equal(schedule.alpha_bars, schedule_of({"_class_name": kind}, "folder").alpha_bars)
        assert f"'{key}'" in caplog.text and "sampler." in caplog.text


@pytest.mark.parametrize("kind", SPACED)
@pytest.mark.parametrize("key", sorted(REFUSED))
def test_keys_that_cannot_be_obeyed_are_refused_by_name(kind: str, key: str):
    if key not in keys_of(kind):
        return
    with pytest.raises(ModelError, match=f"{key}={REFUSED[key]}"):
        schedule_of({"_class_name": kind, key: REFUSED[key]}, "folder")


def test_an_unknown_key_and_an_unknown_class_are_refused_by_name():
    with pytest.raises(ModelError, match="`sharpen`"):
        schedule_of({"_class_name": "DDPMScheduler", "sharpen": True}, "folder")
    with pytest.raises(ModelError, match="`original_inference_steps`"):
        schedule_of({"_class_name": "LCMScheduler"}, "folder")
    with pytest.raises(ModelError, match="`HouseScheduler`"):
        schedule_of({"_class_name": "HouseScheduler"}, "folder")


def test_keys_that_a_class_does_not_have_are_ignored_as_diffusers_ignores_them():
    schedule = schedule_of(
        {"_class_name": "EulerDiscreteScheduler", "clip_sample": True, "thresholding": True}, "folder"
    )
    assert schedule.rule == CleanRule()


def test_a_scheduler_without_followable_spacing_is_refused():
    schedule = schedule_of({"_class_name": "KDPM2DiscreteScheduler"}, "folder")
    with pytest.raises(ConfigError, match=r"KDPM2DiscreteScheduler.*DDIMScheduler"):
        schedule.trajectory(STEPS, "scheduler")


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_named_even_spacings_are_the_schedulers(kind: str, spacing: str):
    schedule = schedule_of({"_class_name": kind, "timestep_spacing": spacing, "steps_offset": 1}, "folder")
    own = schedule.trajectory(STEPS, "scheduler")
    named = schedule.trajectory(STEPS, spacing)
    assert named.timesteps == own.timesteps and named.alpha_bars[:-1] == own.alpha_bars[:-1]


def test_linspace_and_karras_are_diffusers():
    ddpm = schedule_of({"_class_name": "DDPMScheduler", "timestep_spacing": "linspace"}, "folder")
    assert ddpm.trajectory(STEPS, "linspace") == ddpm.trajectory(STEPS, "scheduler")
    euler = schedule_of({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "folder")
    named, own = euler.trajectory(STEPS, "karras"), euler.trajectory(STEPS, "scheduler")
    # Euler keeps sigmas and timesteps in float32.
    assert noise_levels(named) == pytest.approx(noise_levels(own), rel=1e-5, abs=1e-6)
    assert named.timesteps == pytest.approx(own.timesteps, abs=0.05)
