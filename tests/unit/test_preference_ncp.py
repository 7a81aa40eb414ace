"""NCP uses DDPM's reverse step, its distances follow their definition, its beta has the scale of noise space."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from acpo_dist.objective.ncp import ncp_statistics, ncp_step, reverse_state
from acpo_dist.objective.noise_space import ErrorStatistics, error_statistics
from acpo_dist.objective.preference import preference_term, split_pairs
from tests.helpers.ncp import calibrated_beta

SD_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
SD_LEVELS = torch.cumprod(1 - SD_BETAS, 0)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_square(values: Tensor) -> Tensor:
    return (values**2).flatten(1).mean(1)


# The reverse step


@pytest.mark.parametrize("timestep", [1, 20, 500, 999])
def test_the_stochastic_step_is_ddpms(timestep: int):
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        variance_type="fixed_small",
    )
    noisy, estimate = noise(2, 4, 5, 5, seed=0), noise(2, 4, 5, 5, seed=1)
    step = ncp_step(torch.tensor([timestep] * 2), scheduler.alphas_cumprod.double(), 1)
    levels = step.alpha_bar_t_B, step.alpha_bar_to_B
    assert step.timesteps_B.tolist() == [timestep - 1] * 2
    theirs = scheduler.step(estimate, timestep, noisy, generator=torch.Generator().manual_seed(7)).prev_sample
    drawn = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(7), dtype=noisy.dtype)
    # diffusers keeps its levels in float32, and its variance never below 1e-20.
    torch.testing.assert_close(reverse_state(noisy, estimate, *levels, drawn), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("timestep", "one", "twenty"),
    [(50, 0.0050, 0.054), (200, 0.0041, 0.042), (500, 0.0057, 0.057), (900, 0.0105, 0.108)],
)
def test_a_stride_of_20_moves_the_state_about_ten_times_as_far(timestep: int, one: float, twenty: float):
    # Figures of the SD schedule, worked out apart from this code.
    noisy, zero, unit = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (0.3, 0.0, 1.0))
    for stride, wanted in ((1, one), (20, twenty)):
        step = ncp_step(torch.tensor([timestep]), SD_LEVELS, stride)
        z = zero if stride == 1 else None
        here, there = (
            reverse_state(noisy, estimate, step.alpha_bar_t_B, step.alpha_bar_to_B, z) for estimate in (zero, unit)
        )
        assert abs(float(here - there)) == pytest.approx(wanted, rel=0.02)


def test_the_true_noise_leads_to_the_true_state_under_the_deterministic_step():
    clean, eps, alpha_bars = (
        noise(2, 3, 4, 4, seed=0),
        noise(2, 3, 4, 4, seed=1),
        torch.linspace(0.99, 0.1, 50).double(),
    )
    step = ncp_step(torch.tensor([30, 8]), alpha_bars, 20)
    assert step.timesteps_B.tolist() == [10, 0]
    at, to = (value.reshape(-1, 1, 1, 1) for value in (alpha_bars[[30, 8]], alpha_bars[[10, 0]]))
    noisy = at.sqrt() * clean + (1 - at).sqrt() * eps
    found = reverse_state(noisy, eps, step.alpha_bar_t_B, step.alpha_bar_to_B, None)
    torch.testing.assert_close(found, to.sqrt() * clean + (1 - to).sqrt() * eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("posterior", [True, False])
def test_half_precision_inputs_take_the_step_in_float32(posterior: bool):
    noisy, estimate = noise(1, 2, 3, 3, seed=0).bfloat16(), noise(1, 2, 3, 3, seed=1).bfloat16()
    levels = torch.tensor([0.50], dtype=torch.float64), torch.tensor([0.51], dtype=torch.float64)
    z = noise(1, 2, 3, 3, seed=2) if posterior else None
    found = reverse_state(noisy, estimate, *levels, z)
    wanted = reverse_state(noisy.double(), estimate.double(), *levels, z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("timestep", "stride"), [(0, 1), (5, 0)])
def test_a_step_of_length_zero_is_refused(timestep: int, stride: int):
    with pytest.raises(ValueError, match="timesteps >= 1 and a stride >= 1"):
        ncp_step(torch.tensor([7, timestep]), torch.linspace(0.99, 0.1, 50), stride)


# Distances and the losses on them


def small_features(state: Tensor, timesteps: Tensor) -> list[Tensor]:
    """A smooth nonlinear stand-in with two stages of different size."""
    when = timesteps.reshape(-1, 1, 1, 1) / 1000
    return [torch.tanh(3 * state + when), (2 * state).sin().mean(1, keepdim=True)[..., :2]]


def small_inputs() -> dict[str, Tensor]:
    names = ("noisy", "policy_noise", "reference_noise", "noise", "posterior_noise")
    return {name: noise(4, 2, 4, 4, seed=index) for index, name in enumerate(names)}


def test_the_statistics_are_the_distances_of_the_definition():
    inputs, step = small_inputs(), ncp_step(torch.tensor([3, 40, 300, 800]), SD_LEVELS, 1)
    found = ncp_statistics(small_features, **inputs, step=step)

    def look(name: str) -> list[Tensor]:
        z, levels = inputs["posterior_noise"], (step.alpha_bar_t_B, step.alpha_bar_to_B)
        return small_features(reverse_state(inputs["noisy"], inputs[name], *levels, z), step.timesteps_B)

    truth = look("noise")
    distance = {}
    for name in ("policy_noise", "reference_noise"):
        parts = [mean_square(value - wanted) for value, wanted in zip(look(name), truth, strict=True)]
        distance[name] = (parts[0] + parts[1]) / 2
    torch.testing.assert_close(found.policy_error, distance["policy_noise"], rtol=1e-10, atol=1e-16)
    torch.testing.assert_close(found.reference_error_B, distance["reference_noise"], rtol=1e-10, atol=1e-16)
    excess = distance["policy_noise"] - distance["reference_noise"]
    torch.testing.assert_close(found.excess, excess, rtol=1e-8, atol=1e-16)


def test_three_encoder_passes_serve_both_distances_and_one_keeps_a_graph():
    inputs, graphs = small_inputs(), []
    for value in inputs.values():
        value.requires_grad_(True)

    def features(state: Tensor, timesteps: Tensor) -> list[Tensor]:
        graphs.append(state.requires_grad)
        return small_features(state, timesteps)

    step = ncp_step(torch.tensor([3, 40, 300, 800]), SD_LEVELS, 1)
    ncp_statistics(features, **inputs, step=step)
    assert sorted(graphs) == [False, False, True]


def test_ncp_dpo_starts_at_log_2_and_its_gradient_is_that_of_finite_differences():
    inputs, step = small_inputs(), ncp_step(torch.tensor([3, 40, 300, 800]), SD_LEVELS, 20)
    inputs["posterior_noise"] = None

    def loss(policy: Tensor) -> Tensor:
        statistics = ncp_statistics(small_features, **(inputs | {"policy_noise": policy}), step=step)
        return preference_term("dpo", *split_pairs(statistics), beta=100.0).loss_P.sum()

    start = loss(inputs["reference_noise"])
    assert float(start) == pytest.approx(2 * math.log(2), abs=1e-6)
    policy = inputs["policy_noise"].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(loss, (policy,), eps=1e-6, atol=1e-7, rtol=1e-4)


# Calibration


def test_calibration_gives_noise_space_logits_when_the_features_are_the_state_itself():
    # f = identity at one t: the distance is the noise error times one constant, so the logits must be equal.
    inputs, step = small_inputs(), ncp_step(torch.tensor([300] * 4), SD_LEVELS, 1)
    distances = ncp_statistics(lambda state, _: [state], **inputs, step=step)
    errors = error_statistics(inputs["policy_noise"], inputs["reference_noise"], inputs["noise"])
    beta = calibrated_beta(errors, distances)
    assert beta > 1e8  # the distance is that much smaller
    logits = [
        preference_term("dpo", *split_pairs(found), beta=value).logit_P
        for found, value in ((errors, 5000.0), (distances, beta))
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-8, atol=0)


@pytest.mark.parametrize("distance", [0.0, math.nan, math.inf])
def test_no_beta_is_calibrated_on_useless_distances(distance: float):
    zeros = torch.zeros(2)
    noise_errors, distances = (
        ErrorStatistics(cross_B=zeros, drift_B=zeros, reference_error_B=torch.tensor([0.0, value]))
        for value in (1.0, distance)
    )
    with pytest.raises(ValueError, match="cannot be calibrated"):
        calibrated_beta(noise_errors, distances)
