"""Splitting against closed forms and fine references of the guided ODE with two Gaussian branches."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from acpo_dist.diffusion.plms import PLMS, noise_levels
from acpo_dist.diffusion.sampling import guide, sample
from acpo_dist.diffusion.splitting import GuidedDenoise, sample_split
from acpo_dist.diffusion.trajectory import Trajectory, explicit_trajectory, spaced_trajectory
from tests.helpers.predictions import PREDICTION_TYPES

SDXL_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
SDXL_LEVELS = torch.cumprod(1 - SDXL_BETAS, 0)
SCHEMES = ["ltsp", "stsp"]
START = torch.tensor([[[[0.7, -1.1, 0.2]]]])
EQUAL = {"conditional": (0.8, 0.25), "unconditional": (-0.3, 0.25)}
"""Mean and variance of the data of each branch."""
UNEQUAL = {"conditional": (0.8, 0.1), "unconditional": (-0.3, 0.4)}


def uneven(num_steps: int, last: float = 0.2) -> Trajectory:
    """From SDXL's noisiest level to sigma `last`, evenly in sigma ** (1 / 3); the timesteps are the sigmas."""
    first = noise_levels(explicit_trajectory(SDXL_LEVELS, [999]))[0] ** (1 / 3)
    places = [first + (last ** (1 / 3) - first) * index / num_steps for index in range(num_steps + 1)]
    sigmas = [place**3 for place in places]
    return Trajectory(timesteps=tuple(sigmas[:-1]), alpha_bars=tuple(1 / (1 + sigma**2) for sigma in sigmas))


def branch(state: Tensor, sigmas: Tensor, *, mean: float, variance: float, kind: str = "epsilon") -> Tensor:
    """The optimal prediction for data N(mean, variance): eps = sigma (z - mean) / (sigma^2 + variance), z = x / a."""
    sigma = float(sigmas[0])
    signal = 1 / math.sqrt(1 + sigma**2)
    noise = sigma * (state / signal - mean) / (sigma**2 + variance)
    clean = (state - signal * sigma * noise) / signal
    return {"epsilon": noise, "v_prediction": signal * (noise - sigma * clean), "sample": clean}[kind]


def guided(branches: dict[str, tuple[float, float]], kind: str = "epsilon") -> GuidedDenoise:
    conditional, unconditional = (
        partial(branch, mean=mean, variance=variance, kind=kind)
        for mean, variance in (branches["conditional"], branches["unconditional"])
    )
    return GuidedDenoise(conditional=conditional, both=lambda x, t: (conditional(x, t), unconditional(x, t)))


def reference(branches: dict[str, tuple[float, float]], trajectory: Trajectory, weight: float) -> Tensor:
    """The guided ODE in z, to 1e-12."""

    def slope(sigma: float, z: np.ndarray) -> np.ndarray:
        first, second = (
            sigma * (z - branches[name][0]) / (sigma**2 + branches[name][1])
            for name in ("conditional", "unconditional")
        )
        return second + weight * (first - second)

    sigmas = noise_levels(trajectory)
    start = START.double().flatten().numpy() / math.sqrt(trajectory.alpha_bars[0])
    solved = solve_ivp(slope, (sigmas[0], sigmas[-1]), start, method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(solved.y[:, -1].copy()).reshape(START.shape) * math.sqrt(trajectory.alpha_bars[-1])


def error(scheme: str, branches: dict[str, tuple[float, float]], trajectory: Trajectory, weight: float = 5.0) -> float:
    arrived = sample_split(guided(branches), START, trajectory, "epsilon", guidance_scale=weight, scheme=scheme)
    return float((arrived - reference(branches, trajectory, weight)).abs().max())


def test_the_reference_is_the_closed_form_where_the_branches_have_equal_spread():
    # Then guidance only moves the mean, to m_u + w (m_c - m_u), and z - m shrinks as for one Gaussian.
    trajectory = uneven(10)
    first, last = noise_levels(trajectory)[0], noise_levels(trajectory)[-1]
    mean = -0.3 + 5 * 1.1
    start = START.double() / math.sqrt(trajectory.alpha_bars[0])
    exact = mean + (start - mean) * math.sqrt((last**2 + 0.25) / (first**2 + 0.25))
    exact = exact * math.sqrt(trajectory.alpha_bars[-1])
    torch.testing.assert_close(reference(EQUAL, trajectory, 5.0), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("scheme", "low", "high"), [("ltsp", 1.8, 2.3), ("stsp", 3.5, 12)])
def test_lie_trotter_is_of_first_and_strang_of_second_order(scheme: str, low: float, high: float):
    assert low < error(scheme, EQUAL, uneven(20)) / error(scheme, EQUAL, uneven(40)) < high


def clean_end(num_steps: int) -> Trajectory:
    """Steps as models are sampled; the timesteps are the sigmas."""
    trajectory = spaced_trajectory(SDXL_LEVELS, num_steps, "trailing")
    return Trajectory(timesteps=noise_levels(trajectory)[:-1], alpha_bars=trajectory.alpha_bars)


@pytest.mark.parametrize("branches", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("num_steps", [10, 20, 40])
def test_strang_is_nearer_than_lie_trotter_on_a_trajectory_that_ends_clean(branches, num_steps: int):
    trajectory = clean_end(num_steps)
    assert error("stsp", branches, trajectory) < 0.5 * error("ltsp", branches, trajectory)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_splitting_is_stable_under_strong_guidance_in_few_steps_where_plain_plms_is_not(scheme: str):
    trajectory, branches = clean_end(10), {"conditional": (0.8, 0.05), "unconditional": (-0.3, 1.0)}
    model = guided(branches)
    whole = sample(lambda x, t: guide(*model.both(x, t), 7.5), START, trajectory, "epsilon", sampler=PLMS())
    plain = float((whole - reference(branches, trajectory, 7.5)).abs().max())
    assert error(scheme, branches, trajectory, weight=7.5) < 0.1 * plain


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_guidance_both_schemes_are_the_plain_plms_walk_at_its_cost(scheme: str):
    trajectory, model = uneven(12), guided(EQUAL)

    def never(state: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("the unconditional branch is not needed")

    alone = GuidedDenoise(conditional=model.conditional, both=never)
    split = sample_split(alone, START, trajectory, "epsilon", guidance_scale=1.0, scheme=scheme)
    assert torch.equal(split, sample(model.conditional, START, trajectory, "epsilon", sampler=PLMS()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_branches_that_agree_make_both_schemes_the_plain_plms_walk_at_any_scale(scheme: str):
    trajectory, model = uneven(12), guided({"conditional": (0.8, 0.25), "unconditional": (0.8, 0.25)})
    split = sample_split(model, START, trajectory, "epsilon", guidance_scale=7.0, scheme=scheme)
    assert torch.equal(split, sample(model.conditional, START, trajectory, "epsilon", sampler=PLMS()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("last", [0.0, 0.2])
def test_noise_that_ignores_the_state_moves_by_the_guided_noise_times_the_distance(scheme: str, last: float):
    trajectory = uneven(10, last)
    sigmas = noise_levels(trajectory)

    # The model says 1 and guidance 4 * 0.1 sigma. The trapezoid of `stsp` is exact for it, which includes the end; the
    # left ends of `ltsp` are not.
    def both(state: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(state), torch.ones_like(state) - 0.1 * at.reshape(-1, 1, 1, 1)

    model = GuidedDenoise(conditional=lambda x, t: torch.ones_like(x), both=both)
    arrived = sample_split(model, START, trajectory, "epsilon", guidance_scale=5.0, scheme=scheme)
    z = arrived / math.sqrt(trajectory.alpha_bars[-1]) - START / math.sqrt(trajectory.alpha_bars[0])
    steps = [(left, left - right) for left, right in pairwise(sigmas)]
    at = [left if scheme == "ltsp" else left - width / 2 for left, width in steps]
    moved = sum(width * (1 + 4 * 0.1 * place) for place, (_, width) in zip(at, steps, strict=True))
    # z of size 15 in float32.
    torch.testing.assert_close(z, torch.full_like(z, -moved), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_prediction_types_arrive_at_the_same_place(scheme: str):
    arrived = [
        sample_split(guided(UNEQUAL, kind), START, uneven(12), kind, guidance_scale=5.0, scheme=scheme)
        for kind in PREDICTION_TYPES
    ]
    for other in arrived[1:]:
        # float32 with 1 / a up to 15, times a guidance of 5.
        torch.testing.assert_close(other, arrived[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_level_costs_both_branches_once_and_the_conditional_once_more(scheme: str):
    calls, model, seen = {"both": 0, "conditional": 0}, guided(EQUAL), []

    def counted(name: str):
        def call(state: Tensor, sigmas: Tensor):
            calls[name] += 1
            return getattr(model, name)(state, sigmas)

        return call

    sample_split(
        GuidedDenoise(conditional=counted("conditional"), both=counted("both")), START, uneven(9), "epsilon",
        guidance_scale=3.0, scheme=scheme, visit=lambda step, state: seen.append(step),
    )  # fmt: skip
    assert calls == {"both": 9, "conditional": 9} and seen == list(range(9))


def test_visitors_of_strang_splitting_see_the_solution_between_the_halves():
    trajectory, seen = uneven(40), {}
    model = guided(EQUAL)
    sample_split(
        model, START, trajectory, "epsilon", guidance_scale=5.0, scheme="stsp",
        visit=lambda step, state: seen.setdefault(step, state),
    )  # fmt: skip
    half = Trajectory(timesteps=trajectory.timesteps[:20], alpha_bars=trajectory.alpha_bars[:21])
    # As near the solution midway as the result is at the end, where the guidance of one half step is 0.4.
    torch.testing.assert_close(seen[20].double(), reference(EQUAL, half, 5.0), rtol=0, atol=0.02)


def test_an_unknown_scheme_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'yoshida'.*ltsp, stsp"):
        sample_split(guided(EQUAL), START, uneven(4), "epsilon", guidance_scale=3.0, scheme="yoshida")
