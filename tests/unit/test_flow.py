"""Flow models in the coordinates of discrete schedules: levels, conversions, samplers and losses."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional

from acpo_dist.algorithms.config import TimestepsConfig
from acpo_dist.algorithms.noising import draw_timestep
from acpo_dist.core.errors import ConfigError, ModelError
from acpo_dist.diffusion.flow import flow_alpha_bar, flow_alpha_bars, flow_inputs, flow_sigma, flow_trajectory, shifted
from acpo_dist.diffusion.prediction import add_noise, flow_scale, to_clean, to_noise, to_velocity
from acpo_dist.diffusion.sampling import StochasticDDIM, ddim_step, sample
from acpo_dist.diffusion.splitting import GuidedDenoise, sample_split
from acpo_dist.models.noise_levels import schedule_of
from acpo_dist.models.schedulers import SAMPLERS, UNSHIFTED, flow_line, make_sampler, pipeline_arguments
from acpo_dist.objective.anchor import drift_unit, loss_space, output_drift
from acpo_dist.objective.noise_space import denoising_residual, noise_statistics, target_output
from acpo_dist.objective.policy_gradient import transition
from acpo_dist.objective.preference import preference_term

SIGMAS = (0.0, 0.02, 0.3, 0.5, 0.9, 0.999, 1.0)
KIND = "flow_prediction"
VARIANCE = 0.3
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def gaussian_velocity(state: Tensor, sigma: float) -> Tensor:
    """Velocity of the flow of N(0, VARIANCE I): E[eps - x_0 | x]."""
    own = (1 - sigma) ** 2 * VARIANCE + sigma**2
    return state * (sigma - (1 - sigma) * VARIANCE) / own


def gaussian_flow(noisy: Tensor, timesteps: Tensor) -> Tensor:
    state, at = flow_inputs(noisy, timesteps, 1000)
    return gaussian_velocity(state, float(at[0]) / 1000)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_sigma_and_alpha_bar_are_inverse(sigma: float) -> None:
    assert flow_sigma(flow_alpha_bar(sigma)) == pytest.approx(sigma, abs=1e-12)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_velocity_converts_to_clean_and_noise_as_in_flow_coordinates(sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    level = torch.full((2,), flow_alpha_bar(sigma), dtype=torch.float64)
    noisy = add_noise(clean, noise, level)
    torch.testing.assert_close(flow_scale(level, noisy) * noisy, (1 - sigma) * clean + sigma * noise)
    velocity = target_output(clean, noise, level, KIND)
    torch.testing.assert_close(to_clean(velocity, noisy, level, KIND), clean)
    torch.testing.assert_close(to_noise(velocity, noisy, level, KIND), noise)
    own = to_velocity(velocity, noisy, level)
    torch.testing.assert_close(own, target_output(clean, noise, level, "v_prediction"))
    assert float(denoising_residual(velocity, noisy, clean, noise, level, KIND).abs().max()) == 0


@pytest.mark.parametrize("sigma", SIGMAS)
def test_drift_of_a_velocity_scales_by_one_minus_sigma_in_noise_units_and_by_sigma_in_x0_units(sigma: float) -> None:
    level = torch.full((1,), flow_alpha_bar(sigma), dtype=torch.float64)
    policy, base = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    for space, factor in {"eps": 1 - sigma, "v": 1.0, "auto": 1.0, "x0": -sigma}.items():
        assert float(output_drift(policy, base, level, KIND, space)) == pytest.approx(1.5 * factor, abs=1e-12)
        if space != "auto":
            assert drift_unit(float(level), space, KIND) == pytest.approx(factor**2, abs=1e-12)


def test_the_first_level_of_the_table_has_no_signal_and_timesteps_end_at_minus_one() -> None:
    table = flow_alpha_bars(1000)
    assert table[-1] == 0
    assert table[499] == pytest.approx(0.5)
    trajectory = flow_trajectory([1.0, 0.5, 0.0], 1000)
    assert trajectory.timesteps == (999.0, 499.0)
    assert trajectory.alpha_bars == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ddim_equals_the_euler_step_of_the_flow_from_pure_noise_on(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    state = start
    for at in scheduler.timesteps:
        state = scheduler.step(gaussian_velocity(state, float(at) / 1000), at, state).prev_sample
    trajectory = schedule_of(FLOW | {"shift": shift}, "here").trajectory(8, "scheduler")
    torch.testing.assert_close(sample(gaussian_flow, start, trajectory, KIND), state, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_solver_starts_at_pure_noise_and_approaches_the_flow(name: str) -> None:
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    exact = start * math.sqrt(VARIANCE)
    trajectory = schedule_of(FLOW, "here").trajectory(40, "trailing")
    final = sample(gaussian_flow, start, trajectory, KIND, sampler=make_sampler(name, flow_alpha_bars(1000)))
    coarse = sample(gaussian_flow, start, schedule_of(FLOW, "here").trajectory(10, "trailing"), KIND)
    assert float((final - exact).abs().max()) < 0.5 * float((coarse - exact).abs().max())


def test_splitting_schemes_are_refused_without_signal() -> None:
    denoise = GuidedDenoise(conditional=gaussian_flow, both=lambda noisy, at: (noisy, noisy))
    trajectory = flow_trajectory([1.0, 0.5, 0.0], 1000)
    with pytest.raises(ValueError, match="ltsp"):
        sample_split(denoise, torch.zeros(1, 2), trajectory, KIND, guidance_scale=2.0, scheme="ltsp")


def test_a_stochastic_step_from_pure_noise_has_the_density_that_it_was_drawn_with() -> None:
    generator = torch.Generator().manual_seed(2)
    start, noise = (torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    levels = [torch.full((2,), flow_alpha_bar(sigma), dtype=torch.float64) for sigma in (1.0, 0.7)]
    velocity = gaussian_velocity(start, 1.0)
    step = transition(velocity, start, levels[0], levels[1], KIND, eta=0.5)
    drawn = ddim_step(velocity, start, float(levels[0][0]), float(levels[1][0]), KIND, eta=0.5, noise=noise)
    torch.testing.assert_close(step.draw(noise), drawn)
    assert torch.isfinite(step.log_prob(drawn)).all()


def test_stochastic_steps_keep_the_marginal_of_the_flow() -> None:
    start = torch.randn(2000, 4, generator=torch.Generator().manual_seed(3))
    draw = torch.Generator().manual_seed(4)
    sampler = StochasticDDIM(0.7, lambda step: torch.randn(start.shape, generator=draw))
    trajectory = schedule_of(FLOW, "here").trajectory(400, "trailing")
    final = sample(gaussian_flow, start, trajectory, KIND, sampler=sampler)
    # The variance estimate of 8000 numbers has a standard error of 1.6 %; 400 steps add a bias of about that size.
    assert float(final.var()) == pytest.approx(VARIANCE, rel=0.1)


def test_named_spacings_apply_the_shift_of_the_scheduler_once_and_sampler_shift_replaces_it() -> None:
    schedule = schedule_of(FLOW | {"shift": 3.0}, "here")
    found = [flow_sigma(level) for level in schedule.trajectory(4, "trailing").alpha_bars]
    assert found == pytest.approx([shifted(sigma, 3.0) for sigma in (1, 0.75, 0.5, 0.25, 0)], abs=1e-6)
    even = [flow_sigma(level) for level in schedule.trajectory(4, "trailing", 1.0).alpha_bars]
    assert even == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-6)


def test_a_pipeline_follows_a_trajectory_only_without_a_second_shift() -> None:
    trajectory = flow_trajectory([1.0, 0.8, 0.3, 0.0], 1000)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ConfigError, match="shift"):
        pipeline_arguments(scheduler, trajectory)
    plain = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **UNSHIFTED)
    plain.set_timesteps(**pipeline_arguments(plain, trajectory))
    assert plain.sigmas.tolist() == pytest.approx(flow_line(trajectory))


def test_timesteps_of_losses_are_uniform_logit_normal_or_shifted() -> None:
    def drawn(**drawing: Any) -> Tensor:
        config, generator = TimestepsConfig(**drawing), torch.Generator().manual_seed(0)
        return torch.tensor([draw_timestep(generator, 1, 1001, config) for _ in range(2000)]).double()

    uniform, normal, noisy = drawn(), drawn(distribution="logit_normal"), drawn(shift=3.0)
    assert all(1 <= float(each.min()) and float(each.max()) <= 1000 for each in (uniform, normal, noisy))
    # Standard deviations of the shares: 0.289 uniform, 0.208 logit-normal; a shift of 3 moves the median to 0.75.
    assert float(uniform.std()) == pytest.approx(289, rel=0.06)
    assert float(normal.std()) == pytest.approx(208, rel=0.06)
    assert float(noisy.median()) == pytest.approx(750, rel=0.05)


def test_what_does_not_fit_a_flow_model_is_refused_by_name() -> None:
    schedule = schedule_of(FLOW, "here")
    with pytest.raises(ConfigError, match=r"sampler\.spacing.*karras"):
        schedule.trajectory(4, "karras")
    with pytest.raises(ConfigError, match=r"sampler\.shift"):
        schedule.trajectory(4, "scheduler", 2.0)
    with pytest.raises(ConfigError, match=r"sampler\.shift"):
        schedule_of({"_class_name": "DDPMScheduler"}, "here").trajectory(4, "trailing", 2.0)
    with pytest.raises(ModelError, match="FlowMatchHeunDiscreteScheduler"):
        schedule_of({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "here")
    with pytest.raises(ModelError, match="EDMEulerScheduler"):
        schedule_of({"_class_name": "EDMEulerScheduler"}, "here")
    with pytest.raises(ModelError, match="use_flow_sigmas"):
        schedule_of({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "here")
    with pytest.raises(ModelError, match="stochastic_sampling"):
        schedule_of(FLOW | {"stochastic_sampling": True}, "here")


def test_the_dpo_logit_of_a_flow_model_is_flow_dpos_on_squared_velocity_errors() -> None:
    """Flow-DPO (arXiv 2501.13918) with a constant beta; half and mean as in Diffusion-DPO."""
    generator = torch.Generator().manual_seed(0)
    clean, noise, policy, reference = (
        torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    levels = torch.tensor([flow_alpha_bar(sigma) for sigma in (0.1, 0.1, 1.0, 1.0)], dtype=torch.float64)
    target = target_output(clean, noise, levels, KIND)
    errors = noise_statistics(policy, reference, target, levels, KIND, space=loss_space(KIND))
    beta = 7.0
    term = preference_term("dpo", errors.rows(slice(0, None, 2)), errors.rows(slice(1, None, 2)), beta=beta)

    def error(velocity: Tensor) -> Tensor:
        return (velocity - (noise - clean)).square().mean((1, 2, 3))

    gain = error(policy) - error(reference)
    torch.testing.assert_close(term.logit_P, -beta / 2 * (gain[::2] - gain[1::2]))
    torch.testing.assert_close(term.loss_P, -functional.logsigmoid(-beta / 2 * (gain[::2] - gain[1::2])))
