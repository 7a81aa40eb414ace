"""Units and start weight of the anchor, min-SNR weights, and slopes of disagreeing rewards."""

import math

import pytest
import torch
from diffusers.training_utils import compute_snr

from acpo_dist.objective.anchor import output_drift, resolve_space
from acpo_dist.objective.composition import composition_slopes
from acpo_dist.objective.controller import initial_anchor_weight
from acpo_dist.objective.noise_space import min_snr_weight


@pytest.mark.parametrize(("kind", "space"), [("v_prediction", "v"), ("epsilon", "eps"), ("sample", "eps")])
def test_auto_measures_a_velocity_in_velocities_and_anything_else_in_noise(kind, space):
    assert resolve_space("auto", kind) == space and resolve_space("x0", kind) == "x0"
    policy, base = (torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    levels = torch.tensor([0.9, 0.2], dtype=torch.float64)
    drift = output_drift(policy, base, levels, kind, "auto")
    assert torch.equal(drift, output_drift(policy, base, levels, kind, space))


def test_a_velocity_drift_at_zero_terminal_snr_is_seen_by_auto_and_not_in_noise_units():
    policy, base, levels = torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([2.0**-48], dtype=torch.float64)
    assert float(output_drift(policy, base, levels, "v_prediction", "auto").square().mean()) == 1
    assert float(output_drift(policy, base, levels, "v_prediction", "eps").square().mean()) < 1e-9


def test_the_start_weight_of_two_branches_gives_the_budget_in_the_local_problem():
    # -<g_c, D_c> - <g_u, D_u> + lambda / (2 D) (|D_c|^2 + |D_u|^2), g_c = w g and g_u = (1 - w) g, solved by torch.
    scale, elements, budget = 5.0, 64, 0.2
    gradient = torch.randn(elements, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = float(gradient.norm()) * math.sqrt(2 * (scale**2 + (1 - scale) ** 2))
    weight = initial_anchor_weight(reward_weight=1.0, num_elements=elements, gradient_norm=norm, budget=budget)
    drifts = torch.zeros(2, elements, dtype=torch.float64, requires_grad=True)
    loss = -(scale * gradient @ drifts[0] + (1 - scale) * gradient @ drifts[1])
    loss = loss + weight * (drifts.square().mean(1)).mean()
    (slope,) = torch.autograd.grad(loss, drifts)
    # The problem is quadratic with curvature weight / elements.
    minimiser = -slope / (weight / elements)
    assert float(minimiser.square().mean().sqrt()) == pytest.approx(budget, rel=1e-9)


def test_min_snr_weights_are_those_of_diffusers_signal_to_noise_ratio():
    class Scheduler:
        alphas_cumprod = torch.tensor([0.999, 0.9, 0.5, 0.1], dtype=torch.float64)

    at = torch.arange(4)
    snr = compute_snr(Scheduler(), at)
    wanted = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
    torch.testing.assert_close(min_snr_weight(Scheduler.alphas_cumprod, 5.0), wanted.double())
    # On a velocity: its error is the noise error / alpha_bar, its weight min(SNR, gamma) / (SNR + 1).
    velocity = snr.clamp(max=5.0) / (snr + 1) / Scheduler.alphas_cumprod
    torch.testing.assert_close(min_snr_weight(Scheduler.alphas_cumprod, 5.0), velocity.double())


@pytest.mark.parametrize("spread", [1.0, 1.5, 4.0])
def test_no_reward_is_pushed_down_for_being_the_best(spread):
    qualities = torch.tensor([[3.0, 1.0], [0.0, 0.9], [0.1, -2.0]], dtype=torch.float64)
    slopes = composition_slopes(qualities, [1.0, 1.0, 2.0], spread)
    assert bool((slopes >= 0).all()) and bool((slopes > 0).any(0).all())
