"""NFT equals its two branches, and DDPO's transitions are the Gaussians of the sampler."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.distributions import Independent, Normal

from acpo_dist.diffusion.clean_rule import CleanRule
from acpo_dist.diffusion.flow import flow_alpha_bar, flow_trajectory
from acpo_dist.diffusion.sampling import FlowGrpo, StochasticDDIM, ddim_step, sample
from acpo_dist.diffusion.trajectory import Trajectory, spaced_trajectory
from acpo_dist.models.ddpm import DdpmFamily
from acpo_dist.objective.noise_space import error_statistics
from acpo_dist.objective.policy_gradient import (
    clipped_surrogate,
    nft_loss,
    reward_weights,
    transition,
)
from tests.helpers.predictions import PREDICTION_TYPES

# Non-uniform on purpose: no spacing rule leads from one level to the next.
LEVELS = (0.02, 0.11, 0.13, 0.48, 0.81, 0.97)


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def levels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def steps(prediction_type: str = "epsilon", eta: float = 0.7):
    """All five steps of the trajectory above at once, one per sample."""
    model_output, noisy = noise(5, 3, 4, 4, seed=0), noise(5, 3, 4, 4, seed=1)
    return (
        model_output,
        noisy,
        transition(model_output, noisy, levels(*LEVELS[:5]), levels(*LEVELS[1:]), prediction_type, eta=eta),
    )


# NFT and reward-weighted regression


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_nft_is_its_two_branch_form_up_to_a_constant(beta: float):
    policy = noise(4, 2, 5, seed=0).requires_grad_(True)
    old, target = noise(4, 2, 5, seed=1), noise(4, 2, 5, seed=2)
    advantage = levels(-1.0, -0.2, 0.6, 1.0)
    loss = nft_loss(error_statistics(policy, old, target), advantage, beta)

    positive, negative = old + beta * (policy - old), old - beta * (policy - old)
    r = (1 + advantage) / 2
    branches = r * ((positive - target) ** 2).mean((1, 2)) + (1 - r) * ((negative - target) ** 2).mean((1, 2))
    constant = ((old - target) ** 2).mean((1, 2))
    torch.testing.assert_close(beta * loss, branches - constant, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    (wanted,) = torch.autograd.grad(branches.sum() / beta, policy)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_nft_moves_towards_the_noise_of_good_samples_and_away_from_that_of_bad_ones(advantage: float):
    old, target, beta = noise(1, 6, seed=0), noise(1, 6, seed=1), 0.8
    best = (old - advantage / beta * (old - target)).requires_grad_(True)
    loss = nft_loss(error_statistics(best, old, target), levels(advantage), beta)
    (gradient,) = torch.autograd.grad(loss.sum(), best)
    assert float(gradient.abs().max()) < 1e-12
    assert float(loss.detach()) < 0  # below its value at the old policy: bounded, also for bad samples


def test_reward_weights_are_the_groups_softmax_with_mean_one():
    advantage, temperature = levels(-1.0, 0.0, 2.0), 0.5
    parts = [math.exp(value / temperature) for value in advantage.tolist()]
    wanted = [3 * part / sum(parts) for part in parts]
    assert reward_weights(advantage, temperature).tolist() == pytest.approx(wanted, rel=1e-12)


# Transitions


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_draw_from_the_transition_is_the_samplers_own_step(prediction_type: str, eta: float):
    model_output, noisy, taken = steps(prediction_type, eta)
    draw = noise(5, 3, 4, 4, seed=2)
    found = taken.draw(draw)
    for row in range(5):
        part = slice(row, row + 1)
        wanted = ddim_step(
            model_output[part], noisy[part], LEVELS[row], LEVELS[row + 1], prediction_type, eta=eta, noise=draw[part]
        )
        torch.testing.assert_close(found[part], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_under_a_clip_the_density_is_that_of_the_samplers_clipped_step(prediction_type: str):
    rule, eta = CleanRule(limit=0.4), 0.7
    model_output, noisy, draw = (noise(5, 3, 4, 4, seed=seed) for seed in range(3))
    before, after = levels(*LEVELS[:5]), levels(*LEVELS[1:])
    found = transition(model_output, noisy, before, after, prediction_type, eta=eta, rule=rule)
    free = transition(model_output, noisy, before, after, prediction_type, eta=eta)
    for row in range(5):
        step = Trajectory(timesteps=(500.0,), alpha_bars=LEVELS[row : row + 2])
        wanted = sample(
            lambda state, at, row=row: model_output[row : row + 1], noisy[row : row + 1], step, prediction_type,
            sampler=StochasticDDIM(eta, lambda index, row=row: draw[row : row + 1]), rule=rule,
        )  # fmt: skip
        torch.testing.assert_close(found.draw(draw)[row : row + 1], wanted, rtol=1e-12, atol=1e-12)
    assert float((found.mean - free.mean).abs().max()) > 0.1


def test_on_uniform_steps_the_transition_is_diffusers_ddim():
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(20)
    model_output, noisy, draw = (noise(1, 3, 4, 4, seed=seed) for seed in range(3))
    alpha_bars = scheduler.alphas_cumprod.double()
    for timestep in (950, 500, 50):
        wanted = scheduler.step(model_output, timestep, noisy, eta=0.6, variance_noise=draw).prev_sample
        pair = alpha_bars[[timestep]], alpha_bars[[timestep - 50]]
        found = transition(model_output, noisy, *pair, "epsilon", eta=0.6).draw(draw)
        # diffusers keeps its levels in float32.
        torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=1e-5)


def test_at_eta_1_the_transition_is_ddpms_posterior():
    model_output, noisy, taken = steps("epsilon", 1.0)
    before, after = (value.reshape(-1, 1, 1, 1) for value in (levels(*LEVELS[:5]), levels(*LEVELS[1:])))
    alpha = before / after
    mean = (noisy - (1 - alpha) / (1 - before).sqrt() * model_output) / alpha.sqrt()
    variance = (1 - after) / (1 - before) * (1 - alpha)
    torch.testing.assert_close(taken.mean, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(taken.std_B, variance.sqrt().flatten(), rtol=1e-12, atol=0)


def published_flow_grpo(x: Tensor, v: Tensor, sigma: float, following: float, a: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of a flow model's own next state, as arXiv 2505.05470 writes the step."""
    dt = following - sigma
    g = a * math.sqrt(sigma / (1 - (following if sigma == 1 else sigma)))
    return x + (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt, g * math.sqrt(-dt)


@pytest.mark.parametrize("a", [0.3, 0.7])
def test_flow_grpos_transition_is_the_published_step_and_the_samplers_own(a: float):
    sigmas = (1.0, 0.83, 0.8, 0.4, 0.11)
    model_output, noisy, draw = (noise(4, 3, 4, 4, seed=seed) for seed in range(3))
    alpha_bars = [flow_alpha_bar(sigma) for sigma in sigmas]
    before, after = levels(*alpha_bars[:-1]), levels(*alpha_bars[1:])
    taken = transition(model_output, noisy, before, after, "flow_prediction", eta=a, kind="flow_grpo")
    log_prob = taken.log_prob(taken.draw(draw))
    for row in range(4):
        scale, next_scale = (math.hypot(1 - sigma, sigma) for sigma in sigmas[row : row + 2])
        mean, std = published_flow_grpo(scale * noisy[row], model_output[row], *sigmas[row : row + 2], a)
        torch.testing.assert_close(next_scale * taken.mean[row], mean, rtol=1e-10, atol=1e-12)
        assert float(next_scale * taken.std_B[row]) == pytest.approx(std, rel=1e-10)
        # States are divided by c, so the density differs by log c per element, the same for every policy.
        published = Normal(mean, std).log_prob(mean + std * draw[row]).mean() + math.log(next_scale)
        torch.testing.assert_close(log_prob[row], published, rtol=1e-10, atol=1e-12)
        step = Trajectory(timesteps=(500.0,), alpha_bars=tuple(alpha_bars[row : row + 2]))
        sampler = FlowGrpo(a, lambda index, row=row: draw[row : row + 1])
        wanted = sample(
            lambda state, at, row=row: model_output[row : row + 1], noisy[row : row + 1], step, "flow_prediction",
            sampler=sampler,
        )  # fmt: skip
        torch.testing.assert_close(taken.draw(draw)[row : row + 1], wanted, rtol=1e-10, atol=1e-12)


def test_flow_grpos_steps_keep_the_distribution_of_a_gaussian_flow_and_its_last_step_adds_no_noise():
    # Data N(m, d^2): the exact velocity is linear in x, so mean and variance of the steps have a recursion.
    m, d, a, count = 0.7, 0.4, 0.7, 400
    trajectory = flow_trajectory(np.linspace(1, 0, count + 1).tolist(), 1000)

    def velocity(state: Tensor, at: Tensor) -> Tensor:
        sigma = (float(at[0]) + 1) / 1000
        x = state * math.hypot(1 - sigma, sigma)
        gain = (sigma - (1 - sigma) * d**2) / ((1 - sigma) ** 2 * d**2 + sigma**2)
        return gain * (x - (1 - sigma) * m) - m

    start = noise(20_000, 1, seed=4)
    ends = sample(
        velocity, start, trajectory, "flow_prediction",
        sampler=FlowGrpo(a, lambda step: noise(20_000, 1, seed=100 + step)),
    )  # fmt: skip
    # Five standard errors, and the discretisation error of 400 steps.
    assert float(ends.mean()) == pytest.approx(m, abs=5 * d / 20_000**0.5 + 0.01)
    assert float(ends.std()) == pytest.approx(d, rel=5 / 40_000**0.5 + 0.02)
    one = flow_trajectory([0.5, 0.0], 1000)
    quiet = sample(velocity, start, one, "flow_prediction", sampler=FlowGrpo(a, lambda step: start))
    torch.testing.assert_close(quiet, sample(velocity, start, one, "flow_prediction"))


def test_log_probabilities_are_those_of_torchs_normal_per_element():
    _, _, taken = steps()
    after = taken.draw(noise(5, 3, 4, 4, seed=2))
    normal = Independent(Normal(taken.mean, taken.std_B.reshape(-1, 1, 1, 1)), 3)
    torch.testing.assert_close(taken.log_prob(after), normal.log_prob(after) / 48, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_log_probability_is_the_closed_forms():
    model_output, noisy = noise(1, 3, 4, 4, seed=0).requires_grad_(True), noise(1, 3, 4, 4, seed=1)
    taken = transition(model_output, noisy, levels(0.3), levels(0.5), "epsilon", eta=0.5)
    draw = noise(1, 3, 4, 4, seed=2)
    (gradient,) = torch.autograd.grad(taken.log_prob(taken.draw(draw)).sum(), model_output)
    variance = 0.25 * 0.5 / 0.7 * (1 - 0.3 / 0.5)
    slope = -math.sqrt(0.5) * math.sqrt(0.7 / 0.3) + math.sqrt(0.5 - variance)
    torch.testing.assert_close(gradient, draw / math.sqrt(variance) * slope / 48, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.5])
def test_no_density_is_made_up_for_an_eta_that_has_none(eta: float):
    with pytest.raises(ValueError, match=r"0 < eta <= 1"):
        steps(eta=eta)


@pytest.mark.parametrize(("before", "after"), [(0.9, 1.0), (0.5, 0.5), (0.5, 0.4), (0.0, 0.5)])
def test_no_density_is_made_up_for_a_step_that_has_none(before: float, after: float):
    with pytest.raises(ValueError, match="no density"):
        transition(noise(1, 2, seed=0), noise(1, 2, seed=1), levels(before), levels(after), "epsilon", eta=1.0)


# The surrogate


def test_the_first_ratio_is_1_for_any_batch_size():
    family = DdpmFamily.load(DdpmFamily.Config(path="toy-ddpm"), device="cpu", trainable=False)
    trajectory = spaced_trajectory(family.alpha_bars, 10, "trailing")
    step = 6
    noisy = noise(6, *family.sample_shape, seed=0, dtype=torch.float32)
    draw = noise(6, *family.sample_shape, seed=1, dtype=torch.float32)

    @torch.no_grad()
    def taken(rows: slice):
        state = noisy[rows]
        model_output = family.predict(state, torch.full((len(state),), trajectory.timesteps[step]), family.encode([]))
        pair = (torch.full((len(state),), level, dtype=torch.float64) for level in trajectory.alpha_bars[step:][:2])
        return transition(model_output, state, *pair, family.prediction_type, eta=1.0)

    rollout = taken(slice(None))
    after = rollout.draw(draw)
    old = rollout.log_prob(after)
    for size in (1, 2, 3, 6):
        new = torch.cat([taken(slice(at, at + size)).log_prob(after[at : at + size]) for at in range(0, 6, size)])
        ratio = clipped_surrogate(new, old, torch.ones(6), 1e-4).ratio_B
        # Kernels differ by the batch size in the last digits of float32; a hundredth of DDPO's clip range.
        assert float((ratio - 1).abs().max()) < 1e-6


def test_the_surrogates_first_gradient_is_the_policy_gradient():
    log_prob = levels(-1.0, -2.0).requires_grad_(True)
    term = clipped_surrogate(log_prob, log_prob.detach().clone(), levels(0.7, -1.3), 1e-4)
    (gradient,) = torch.autograd.grad(term.loss_B.sum(), log_prob)
    assert term.ratio_B.tolist() == [1.0, 1.0] and gradient.tolist() == [-0.7, 1.3]


@pytest.mark.parametrize(
    ("shift", "advantage", "passes"),
    [
        # a good sample may become likelier up to the range, a bad one less likely
        (0.05, 1.0, True),
        (0.2, 1.0, False),
        (-0.2, 1.0, True),
        (-0.05, -1.0, True),
        (-0.2, -1.0, False),
        (0.2, -1.0, True),
    ],
)
def test_the_clip_stops_only_steps_that_have_gone_far_enough(shift: float, advantage: float, passes: bool):
    log_prob = levels(shift).requires_grad_(True)
    term = clipped_surrogate(log_prob, levels(0.0), levels(advantage), 0.1)
    (gradient,) = torch.autograd.grad(term.loss_B.sum(), log_prob)
    assert (gradient.item() != 0) is passes and term.is_clipped_B.item() is not passes
    ratio = math.exp(shift)
    wanted = max(-advantage * ratio, -advantage * min(max(ratio, 0.9), 1.1))
    assert term.loss_B.item() == pytest.approx(wanted, rel=1e-12)


def test_the_surrogate_treats_advantages_and_old_log_probabilities_as_constant():
    tensors = [levels(0.1, -0.2).requires_grad_(True) for _ in range(3)]
    loss = clipped_surrogate(*tensors, 0.2).loss_B.sum()
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    assert gradients[0] is not None and gradients[1:] == (None, None)
