"""Wrapped schedulers equal diffusers on native levels; pipelines' schedulers follow a trajectory or are rejected."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from acpo_dist.core.errors import ConfigError
from acpo_dist.diffusion.plms import noise_levels
from acpo_dist.diffusion.sampling import sample
from acpo_dist.diffusion.trajectory import Trajectory, explicit_trajectory, spaced_trajectory
from acpo_dist.models.schedulers import (
    SAMPLERS,
    ScheduledSampler,
    dpmpp_timesteps,
    euler_sigmas,
    make_sampler,
    pipeline_arguments,
)
from tests.helpers.predictions import PREDICTION_TYPES

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDXL_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
SDXL_LEVELS = torch.cumprod(1 - SDXL_BETAS, 0)
NATIVE = {
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpmpp_3m": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "deis": (DEISMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
UNEVEN = Trajectory(
    timesteps=(940.7, 700.2, 655.5, 400.0, 180.3, 60.6, 9.4),
    alpha_bars=(0.008, 0.09, 0.13, 0.4, 0.78, 0.94, 0.99, 1.0),
)


def noise(shape: tuple[int, ...] = (2, 3, 4, 4), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(state: Tensor, timesteps: Tensor) -> Tensor:
    when = timesteps.to(state.dtype).reshape(-1, 1, 1, 1) / 1000
    return torch.sin(2 * state + 3 * when) - 0.5 * torch.cos(state.roll(1, dims=-1)) * when


def plain(scheduler: Any, start: Tensor) -> Tensor:
    """The loop of a diffusers pipeline, from unit noise to the final latents, in x."""
    scaled = isinstance(scheduler, EulerDiscreteScheduler | HeunDiscreteScheduler)
    state = start * (scheduler.sigmas[0] ** 2 + 1) ** 0.5 if scaled else start
    for timestep in scheduler.timesteps:
        model_output = network(scheduler.scale_model_input(state, timestep), timestep.expand(len(state)))
        state = scheduler.step(model_output, timestep, state).prev_sample
    return state


@pytest.mark.parametrize("name", sorted(NATIVE))
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("num_steps", [10, 20])
def test_on_native_timesteps_the_walk_is_plain_diffusers(name: str, prediction_type: str, num_steps: int):
    kind, options = NATIVE[name]
    scheduler = kind(**SDXL, prediction_type=prediction_type, timestep_spacing="trailing", **options)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.unique().flip(0).long().tolist()
    trajectory = explicit_trajectory(SDXL_LEVELS, timesteps)
    if name == "deis":
        # Plain DEIS never reaches a clean end: it stops at the cleanest training level.
        trajectory = Trajectory(
            timesteps=trajectory.timesteps, alpha_bars=(*trajectory.alpha_bars[:-1], float(SDXL_LEVELS[0]))
        )
    ours = sample(network, noise(), trajectory, prediction_type, sampler=make_sampler(name, SDXL_LEVELS))
    # diffusers works its levels out in float32; a network slope of 2 and 1 / a of 15 enlarge that.
    torch.testing.assert_close(ours, plain(scheduler, noise()), rtol=0, atol=5e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_euler_and_first_order_dpm_solver_are_ddim_on_an_uneven_trajectory(prediction_type: str):
    first_order = ScheduledSampler(
        scheduler=DPMSolverMultistepScheduler, alpha_bars=SDXL_LEVELS, options={"solver_order": 1}
    )
    # Outputs that ignore the state, so that the samplers' rounding is not enlarged by a network.
    still = lambda x, t: torch.sin(t / 100).reshape(-1, 1, 1, 1) * noise(tuple(x.shape), seed=1)  # noqa: E731
    wanted = sample(still, noise(), UNEVEN, prediction_type)
    for using in (make_sampler("euler", SDXL_LEVELS), first_order):
        ours = sample(still, noise(), UNEVEN, prediction_type, sampler=using)
        assert float((ours - wanted).norm() / wanted.norm()) < 4e-7


def test_second_order_dpm_solver_on_an_uneven_trajectory_is_its_published_recursion():
    sigmas = noise_levels(UNEVEN)
    model_outputs = [noise(seed=step) for step in range(UNEVEN.num_steps)]
    z, clean_before = noise().double() / UNEVEN.alpha_bars[0] ** 0.5, torch.zeros(())
    for step, model_output in enumerate(model_outputs):
        clean = z - sigmas[step] * model_output.double()
        ratio, slope = sigmas[step + 1] / sigmas[step], torch.zeros(())
        # DPM-Solver++ 2M (Lu et al. 2022, algorithm 2) in z; first order at both ends.
        if 0 < step < len(model_outputs) - 1:
            log = [float(torch.tensor(sigma, dtype=torch.float64).log()) for sigma in sigmas[step - 1 : step + 2]]
            slope = (clean - clean_before) * (log[1] - log[2]) / (log[0] - log[1]) / 2
        z, clean_before = ratio * z + (1 - ratio) * (clean + slope), clean
    answers = iter(model_outputs)
    ours = sample(lambda x, t: next(answers), noise(), UNEVEN, "epsilon", sampler=make_sampler("dpmpp_2m", SDXL_LEVELS))
    # float32 with 1 / a up to 11.
    torch.testing.assert_close(ours.double(), z, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_stays_finite_up_to_a_clean_end_with_few_and_many_steps(name: str):
    for num_steps in (1, 2, 3, 15, 40):
        trajectory = spaced_trajectory(SDXL_LEVELS, num_steps, "trailing")
        arrived = sample(network, noise(), trajectory, "v_prediction", sampler=make_sampler(name, SDXL_LEVELS))
        assert bool(arrived.isfinite().all()) and float(arrived.abs().max()) < 50


@pytest.mark.parametrize("name", ["dmp_2m", "pndm", "ancestral"])
def test_an_unknown_sampler_is_refused_with_the_known_names(name: str):
    with pytest.raises(ConfigError, match=f"`{name}`.*ddim, deis, dpmpp_2m, dpmpp_3m, euler, heun, plms, unipc"):
        make_sampler(name, SDXL_LEVELS)


# Pipelines


def test_a_pipelines_euler_scheduler_takes_the_trajectorys_levels_exactly():
    scheduler = EulerDiscreteScheduler(**SDXL)
    scheduler.set_timesteps(**pipeline_arguments(scheduler, UNEVEN))
    assert len(scheduler.timesteps) == UNEVEN.num_steps
    assert euler_sigmas(UNEVEN)[-1] == 0 and len(euler_sigmas(UNEVEN)) == UNEVEN.num_steps + 1
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(noise_levels(UNEVEN)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_a_pipelines_euler_and_dpm_schedulers_recover_the_timesteps_of_native_levels(spacing: str):
    trajectory = spaced_trajectory(SDXL_LEVELS, 25, spacing)
    euler, solver = EulerDiscreteScheduler(**SDXL), DPMSolverMultistepScheduler(**SDXL)
    for scheduler in (euler, solver):
        scheduler.set_timesteps(**pipeline_arguments(scheduler, trajectory))
    # Euler looks the timestep up by log sigma, in float32.
    assert euler.timesteps.tolist() == pytest.approx(trajectory.timesteps, abs=0.05)
    assert solver.timesteps.tolist() == list(trajectory.timesteps)
    assert solver.sigmas.tolist() == pytest.approx(noise_levels(trajectory), rel=1e-4)


@pytest.mark.parametrize(
    ("timesteps", "whole"),
    [
        ((950.7, 400.2, 3.5), [951, 400, 4]),
        ((10.4, 10.1, 9.9, 9.6), [10, 9, 8, 7]),
        ((3.0, 1.2, 0.6, 0.2), [3, 2, 1, 0]),
        ((999.0, 0.3), [999, 0]),
    ],
)
def test_timesteps_for_dpm_solver_are_rounded_and_kept_apart(timesteps: tuple[float, ...], whole: list[int]):
    levels = [0.1 + 0.8 * index / len(timesteps) for index in range(len(timesteps))]
    assert dpmpp_timesteps(Trajectory(timesteps=timesteps, alpha_bars=(*levels, 1.0))) == whole


def test_more_steps_than_integers_are_refused():
    with pytest.raises(ConfigError, match="3 steps from timestep 1"):
        dpmpp_timesteps(Trajectory(timesteps=(1.2, 0.8, 0.3), alpha_bars=(0.9, 0.95, 0.97, 1.0)))


@pytest.mark.parametrize("kind", [DDIMScheduler, PNDMScheduler, UniPCMultistepScheduler])
def test_pipelines_whose_scheduler_cannot_follow_are_refused_with_the_ones_that_can(kind: type):
    with pytest.raises(ConfigError, match=rf"{kind.__name__} cannot.*EulerDiscreteScheduler.*DPMSolverMultistep"):
        pipeline_arguments(kind(**SDXL), UNEVEN)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_karras_sigmas": True}, "turn off use_karras_sigmas"), ({"final_sigmas_type": "sigma_min"}, "must be zero")],
)
def test_options_that_would_change_the_levels_are_refused(options: dict, reason: str):
    with pytest.raises(ConfigError, match=reason):
        pipeline_arguments(DPMSolverMultistepScheduler(**SDXL, **options), UNEVEN)
