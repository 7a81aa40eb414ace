"""The formulas of diffusion agree with closed forms and, step for step, with diffusers' DDIM scheduler."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from acpo_dist.diffusion.clean_rule import NO_RULE, CleanRule
from acpo_dist.diffusion.prediction import add_noise, to_clean, to_noise
from acpo_dist.diffusion.sampling import ddim_step, guide, keep_states, sample
from acpo_dist.diffusion.trajectory import Trajectory, explicit_trajectory, spaced_trajectory
from tests.helpers.predictions import PREDICTION_TYPES

SDXL_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
SDXL_LEVELS = torch.cumprod(1 - SDXL_BETAS, 0)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outputs_of(clean: Tensor, noise: Tensor, levels: Tensor) -> dict[str, Tensor]:
    """Output of a perfect network of each prediction type, from the definitions."""
    signal, spread = levels.sqrt().reshape(-1, 1, 1, 1), (1 - levels).sqrt().reshape(-1, 1, 1, 1)
    return {"epsilon": noise, "v_prediction": signal * noise - spread * clean, "sample": clean}


def diffusers_ddim(prediction_type: str, **options) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction_type,
        **options,
    )


def network(state: Tensor, timesteps: Tensor) -> Tensor:
    """A nonlinear function of state and time that is no diffusion model: the samplers must agree for any function."""
    when = timesteps.to(state.dtype).reshape(-1, 1, 1, 1) / 1000
    return torch.sin(2 * state + 3 * when) - 0.5 * torch.cos(state.roll(1, dims=-1)) * when


# Predictions


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("timestep", [1, 50, 100, 200, 250, 300])
def test_the_clean_estimate_of_a_perfect_head_is_the_clean_sample(prediction_type: str, timestep: int):
    clean = 2 * torch.rand(4, 3, 16, 16, generator=rng(0), dtype=torch.float64) - 1
    noise = torch.randn(clean.shape, generator=rng(1), dtype=torch.float64)
    levels = SDXL_LEVELS[[timestep] * 4]
    noisy = add_noise(clean, noise, levels).float()
    model_output = outputs_of(clean, noise, levels)[prediction_type].float()
    estimate = to_clean(model_output, noisy, levels, prediction_type)
    # Three roundings of numbers below 4 in float32 (2.4e-7 at most each), over a >= 0.77.
    assert float((estimate - clean).abs().max()) < 1e-6


def test_noise_is_added_with_the_published_formula_at_each_samples_own_level():
    clean = torch.randn(3, 4, 2, 2, generator=rng(0), dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=rng(1), dtype=torch.float64)
    noisy = add_noise(clean, noise, SDXL_LEVELS[[10, 400, 999]])
    for index, timestep in enumerate((10, 400, 999)):
        level = float(SDXL_LEVELS[timestep])
        wanted = math.sqrt(level) * clean[index] + math.sqrt(1 - level) * noise[index]
        # float64 throughout.
        torch.testing.assert_close(noisy[index], wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("timestep", [1, 250, 600, 999])
def test_all_three_heads_give_the_same_clean_sample_and_the_same_noise(timestep: int):
    # Not a perfect network: any head, translated into the other two kinds, must mean the same.
    noisy = torch.randn(2, 3, 8, 8, generator=rng(0), dtype=torch.float64)
    noise = torch.randn(noisy.shape, generator=rng(1), dtype=torch.float64)
    levels = SDXL_LEVELS[[timestep] * 2]
    signal, spread = levels.sqrt().reshape(-1, 1, 1, 1), (1 - levels).sqrt().reshape(-1, 1, 1, 1)
    clean = (noisy - spread * noise) / signal
    for prediction_type, model_output in outputs_of(clean, noise, levels).items():
        # float64 with at most 1 / a = 15 and 1 / s = 25 in front of 1e-16.
        torch.testing.assert_close(
            to_clean(model_output, noisy, levels, prediction_type), clean, rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            to_noise(model_output, noisy, levels, prediction_type), noise, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_half_precision_inputs_are_widened_before_the_formula(dtype: torch.dtype, prediction_type: str):
    noisy = torch.randn(2, 3, 8, 8, generator=rng(0)).to(dtype)
    model_output = torch.randn(noisy.shape, generator=rng(1)).to(dtype)
    levels = SDXL_LEVELS[[250, 300]]
    for convert in (to_clean, to_noise):
        result = convert(model_output, noisy, levels, prediction_type)
        exact = convert(model_output.double(), noisy.double(), levels, prediction_type)
        assert result.dtype == torch.float32
        # The inputs are taken as they are, so only float32 arithmetic is left; half precision would be off by 1e-3.
        assert float((result - exact).abs().max()) < 2e-6


@pytest.mark.parametrize("convert", [to_clean, to_noise])
def test_an_unknown_prediction_type_is_refused_by_name(convert):
    state = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"'flow'.*epsilon, v_prediction, sample"):
        convert(state, state, torch.tensor([0.5]), "flow")


# The x_0 rule


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "rule", [CleanRule(limit=0.7), CleanRule(quantile=0.9, ceiling=3.0)], ids=["clip", "threshold"]
)
@pytest.mark.parametrize("timestep", [1, 500, 999])
def test_after_a_rule_the_output_means_the_restricted_sample_and_its_own_noise(prediction_type, rule, timestep: int):
    noisy, model_output = torch.randn(2, 2, 3, 8, 8, generator=rng(0), dtype=torch.float64).unbind()
    levels = SDXL_LEVELS[[timestep] * 2]
    ruled = rule.apply(model_output, noisy, levels, prediction_type)
    clean = rule.restrict(to_clean(model_output, noisy, levels, prediction_type))
    # float64 with 1 / a up to 15 and 1 / s up to 25.
    torch.testing.assert_close(to_clean(ruled, noisy, levels, prediction_type), clean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(add_noise(clean, to_noise(ruled, noisy, levels, prediction_type), levels), noisy)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_clip_changes_no_bit_of_what_it_does_not_touch(prediction_type: str):
    noisy, model_output = torch.randn(2, 2, 3, 8, 8, generator=rng(0)).unbind()
    levels = SDXL_LEVELS[[200, 400]]
    clean = to_clean(model_output, noisy, levels, prediction_type)
    ruled = CleanRule(limit=1.0).apply(model_output, noisy, levels, prediction_type)
    inside = clean.abs() <= 1
    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.equal(ruled[inside], model_output[inside]) and not bool((ruled == model_output)[~inside].any())
    share = CleanRule(limit=1.0).share_changed(model_output, noisy, levels, prediction_type)
    torch.testing.assert_close(share, (~inside).flatten(1).double().mean(1))


def test_without_a_rule_the_output_is_returned_as_it_is():
    noisy, model_output = torch.randn(2, 2, 3, 8, 8, generator=rng(0)).unbind()
    assert NO_RULE.apply(model_output, noisy, SDXL_LEVELS[[200, 400]], "epsilon") is model_output


def test_clipped_elements_pass_no_gradient():
    noisy, model_output = torch.randn(2, 2, 3, 8, 8, generator=rng(0), dtype=torch.float64).unbind()
    levels, rule = SDXL_LEVELS[[200, 400]], CleanRule(limit=1.0)
    clipped = to_clean(model_output, noisy, levels, "epsilon").abs() > 1
    (gradient,) = torch.autograd.grad(
        rule.apply(model_output.requires_grad_(True), noisy, levels, "epsilon").sum(), model_output
    )
    assert float(gradient[clipped].abs().max()) < 1e-12 and bool((gradient[~clipped] == 1).all())


# Sampling against diffusers


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("spacing", "offset", "num_steps"), [("leading", 1, 30), ("trailing", 0, 20)])
def test_the_walk_is_diffusers_ddim(prediction_type: str, spacing: str, offset: int, num_steps: int):
    scheduler = diffusers_ddim(prediction_type, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(num_steps)
    trajectory = spaced_trajectory(scheduler.alphas_cumprod.double(), num_steps, spacing)
    assert list(trajectory.timesteps) == scheduler.timesteps.tolist()
    state = start = torch.randn(2, 3, 8, 8, generator=rng(0))
    for timestep in scheduler.timesteps:
        state = scheduler.step(network(state, timestep.expand(2)), timestep, state, eta=0.0).prev_sample
    ours = sample(network, start, trajectory, prediction_type)
    # float32 on both sides: 1e-7 per step, grown by 1 / a = 15 at the noisiest and by the network's own slope of 2.
    torch.testing.assert_close(ours, state, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("trailing", 0)])
def test_stochastic_steps_are_diffusers_ddim_steps(prediction_type: str, eta: float, spacing: str, offset: int):
    scheduler = diffusers_ddim(prediction_type, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(10)
    trajectory = spaced_trajectory(scheduler.alphas_cumprod.double(), 10, spacing)
    state = torch.randn(2, 3, 8, 8, generator=rng(0))
    for step, timestep in enumerate(scheduler.timesteps):
        noise = torch.randn(state.shape, generator=rng(step))
        model_output = network(state, timestep.expand(2))
        theirs = scheduler.step(model_output, timestep, state, eta=eta, variance_noise=noise).prev_sample
        level, following = trajectory.alpha_bars[step : step + 2]
        ours = ddim_step(model_output, state, level, following, prediction_type, eta=eta, noise=noise)
        # One step in float32, where diffusers keeps alpha-bar too: 1 - alpha-bar loses 1e-4 of itself at t = 1.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
        state = theirs


def test_a_stochastic_step_without_its_noise_is_refused():
    state = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="noise"):
        ddim_step(state, state, 0.5, 0.6, "epsilon", eta=0.5)


def test_a_deterministic_step_ignores_noise_it_is_given():
    state, model_output, noise = torch.randn(3, 1, 1, 4, 4, generator=rng(0)).unbind()
    with_noise = ddim_step(model_output, state, 0.5, 0.6, "epsilon", noise=noise)
    assert torch.equal(with_noise, ddim_step(model_output, state, 0.5, 0.6, "epsilon"))


@pytest.mark.parametrize("timesteps", [[999, 640, 633, 150, 20, 3], [700], [999, 1]])
def test_a_perfect_network_arrives_at_the_clean_sample_along_any_trajectory(timesteps: list[int]):
    clean = torch.randn(2, 3, 8, 8, generator=rng(0))
    trajectory = explicit_trajectory(SDXL_LEVELS, timesteps)

    def perfect(state: Tensor, at: Tensor) -> Tensor:
        level = float(SDXL_LEVELS[int(at[0])])
        return (state - math.sqrt(level) * clean) / math.sqrt(1 - level)

    arrived = sample(perfect, torch.randn(clean.shape, generator=rng(1)), trajectory, "epsilon")
    # x0-hat is clean at every step; float32 with 1 / a up to 15.
    torch.testing.assert_close(arrived, clean, rtol=0, atol=1e-5)


def test_visitors_see_the_states_before_their_steps_and_only_the_wanted_ones():
    trajectory = explicit_trajectory(SDXL_LEVELS, [999, 500, 100])
    start = torch.randn(1, 2, 4, 4, generator=rng(0))
    kept: dict[int, Tensor] = {}
    sample(network, start, trajectory, "epsilon", visit=keep_states((0, 2), kept))
    middle = ddim_step(network(start, torch.tensor([999.0])), start, *trajectory.alpha_bars[:2], "epsilon")
    late = ddim_step(network(middle, torch.tensor([500.0])), middle, *trajectory.alpha_bars[1:3], "epsilon")
    assert sorted(kept) == [0, 2]
    assert torch.equal(kept[0], start) and torch.equal(kept[2], late)


def test_kept_states_are_copies():
    kept: dict[int, Tensor] = {}
    state = torch.ones(1, 1, 2, 2)
    keep_states((0,), kept)(0, state)
    state.zero_()
    assert kept[0].sum() == 4


def test_guidance_at_scale_one_is_the_conditional_and_at_zero_the_unconditional_answer():
    conditional, unconditional = torch.randn(2, 3, 4, 4, generator=rng(0)).unbind()
    # u + (c - u) rounds twice in float32.
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional, rtol=0, atol=1e-6)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)


def test_guidance_above_one_extrapolates_the_conditional_output():
    guided = guide(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0]), 5.0)
    assert guided.tolist() == [3.0, -2.0]


# Trajectories


@pytest.mark.parametrize("timesteps", [[500, 600], [500, 500], [1, 0, 2]])
def test_timesteps_that_do_not_fall_are_refused(timesteps: list[int]):
    with pytest.raises(ValueError, match="increase from noisy to clean"):
        explicit_trajectory(SDXL_LEVELS, timesteps)


@pytest.mark.parametrize(
    ("timesteps", "levels", "reason"),
    [
        ((500.0,), (0.5,), "N \\+ 1"),
        ((), (1.0,), "N \\+ 1"),
        ((500.0,), (-0.1, 1.0), "lie in"),
        ((500.0,), (0.5, 1.1), "lie in"),
        ((500.0,), (1.0, 1.0), "lie in"),
    ],
)
def test_levels_that_are_no_trajectory_are_refused(timesteps: tuple, levels: tuple, reason: str):
    with pytest.raises(ValueError, match=reason):
        Trajectory(timesteps=timesteps, alpha_bars=levels)


def test_levels_between_the_schedules_own_are_accepted():
    trajectory = Trajectory(timesteps=(740.5, 12.25), alpha_bars=(0.1, 0.97, 0.999))
    state = torch.randn(1, 1, 4, 4, generator=rng(0))
    # A head of zeros predicts no noise: x only grows with the signal, by the ratio of the a's.
    arrived = sample(lambda x, _: torch.zeros_like(x), state, trajectory, "epsilon")
    torch.testing.assert_close(arrived, state * math.sqrt(0.999 / 0.1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("spacing", "num_steps"), [("trailing", 0), ("trailing", 1001), ("even", 10)])
def test_spacings_that_cannot_be_are_refused(spacing: str, num_steps: int):
    with pytest.raises(ValueError, match=r"num_steps must be|unknown spacing"):
        spaced_trajectory(SDXL_LEVELS, num_steps, spacing)


def test_equal_levels_have_equal_names_however_they_were_made():
    spaced = spaced_trajectory(SDXL_LEVELS, 4, "trailing")
    explicit = explicit_trajectory(SDXL_LEVELS.clone(), [999, 749, 499, 249])
    assert spaced.schedule_id == explicit.schedule_id


def test_different_levels_or_timesteps_have_different_names():
    first = Trajectory(timesteps=(500.0, 100.0), alpha_bars=(0.3, 0.9, 1.0))
    other_level = Trajectory(timesteps=(500.0, 100.0), alpha_bars=(0.3, 0.900001, 1.0))
    other_time = Trajectory(timesteps=(500.0, 101.0), alpha_bars=(0.3, 0.9, 1.0))
    other_end = Trajectory(timesteps=(500.0, 100.0), alpha_bars=(0.3, 0.9, 0.999))
    assert len({entry.schedule_id for entry in (first, other_level, other_time, other_end)}) == 4


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 99])
def test_late_steps_are_distinct_ordered_and_below_the_limit(count: int):
    trajectory = spaced_trajectory(SDXL_LEVELS, 20, "trailing")
    steps = trajectory.late_steps(0.3, 1000, count)
    # 20 trailing steps lie at 999, 949, ..., 49; the six last are at or below 300.
    assert len(steps) == min(count, 6)
    assert list(steps) == sorted(set(steps))
    assert all(trajectory.timesteps[step] <= 300 for step in steps)


def test_late_steps_span_the_whole_late_range():
    steps = spaced_trajectory(SDXL_LEVELS, 20, "trailing").late_steps(0.3, 1000, 2)
    assert steps == (14, 19)


def test_a_limit_that_leaves_no_late_step_is_refused_with_the_latest_there_is():
    trajectory = spaced_trajectory(SDXL_LEVELS, 4, "trailing")
    with pytest.raises(ValueError, match="latest is at 249"):
        trajectory.late_steps(0.2, 1000, 4)
