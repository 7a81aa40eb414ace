"""Every sampler solves its ODE: closed forms, measured orders, linearity, and diffusers' PNDM."""

import math
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from torch import Tensor

from acpo_dist.diffusion.plms import PLMS, adams_bashforth, noise_levels
from acpo_dist.diffusion.sampling import DDIM, Sampler, keep_states, sample
from acpo_dist.diffusion.trajectory import Trajectory, explicit_trajectory, spaced_trajectory
from acpo_dist.models.schedulers import SAMPLERS, make_sampler
from tests.helpers.predictions import PREDICTION_TYPES

SDXL_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
SDXL_LEVELS = torch.cumprod(1 - SDXL_BETAS, 0)
SPREAD = 0.25
"""Variance of the Gaussian data."""


def sampler(name: str) -> Sampler:
    return make_sampler(name, SDXL_LEVELS)


def uneven(num_steps: int, last: float = 0.05) -> Trajectory:
    """From SDXL's noisiest level to sigma `last`, evenly in sigma ** (1 / 3); the timesteps are the sigmas."""
    first = noise_levels(explicit_trajectory(SDXL_LEVELS, [999]))[0] ** (1 / 3)
    places = [first + (last ** (1 / 3) - first) * index / num_steps for index in range(num_steps + 1)]
    sigmas = [place**3 for place in places]
    return Trajectory(timesteps=tuple(sigmas[:-1]), alpha_bars=tuple(1 / (1 + sigma**2) for sigma in sigmas))


def gaussian(state: Tensor, sigmas: Tensor) -> Tensor:
    """The best eps for data N(0, SPREAD): sigma z / (sigma^2 + SPREAD), z = x / a."""
    sigma = float(sigmas[0])
    return sigma * state * math.sqrt(1 + sigma**2) / (sigma**2 + SPREAD)


def error(using: Sampler, num_steps: int) -> float:
    """Distance from z(sigma) = z_0 sqrt((sigma^2 + L) / (sigma_0^2 + L)), the solution for `gaussian`."""
    trajectory = uneven(num_steps)
    first, last = noise_levels(trajectory)[0], noise_levels(trajectory)[-1]
    start = torch.tensor([[[[1.0, -2.0, 0.3]]]])
    growth = math.sqrt((last**2 + SPREAD) / (first**2 + SPREAD))
    exact = start * growth * math.sqrt(trajectory.alpha_bars[-1] / trajectory.alpha_bars[0])
    return float((sample(gaussian, start, trajectory, "epsilon", sampler=using) - exact).abs().max())


def network(state: Tensor, timesteps: Tensor) -> Tensor:
    when = timesteps.to(state.dtype).reshape(-1, 1, 1, 1) / 1000
    return torch.sin(2 * state + 3 * when) - 0.5 * torch.cos(state.roll(1, dims=-1)) * when


# The ODE


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ddim", 1.8, 2.2),
        ("euler", 1.8, 2.2),
        ("heun", 3.5, 4.5),
        ("dpmpp_2m", 3.2, 5),
        ("deis", 3.2, 6.5),
        ("unipc", 5, 13),
        ("dpmpp_3m", 6, 13),
        ("plms", 10, 20),
    ],
)
def test_twice_the_steps_divide_the_error_by_two_to_the_order(name: str, low: float, high: float):
    # From 20 steps on diffusers no longer lowers the order near the end; float32 leaves errors above 1e-6.
    assert low < error(sampler(name), 20) / error(sampler(name), 40) < high


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("last", [0.0, 0.2])
def test_the_weights_of_noise_that_ignores_the_state_add_up_to_the_distance(name: str, last: float):
    trajectory = uneven(20, last)
    sigmas, start = noise_levels(trajectory), torch.zeros(1, 1, 1, 1)
    weights = []
    for asked in trajectory.timesteps:
        # One value of eps is 1 and all others are 0: what arrives is, in z, minus that value's weight.
        spike = torch.tensor(asked)
        arrived = sample(lambda x, t, s=spike: x * 0 + (t[0] == s), start, trajectory, "epsilon", sampler=sampler(name))
        weights.append(-float(arrived) / math.sqrt(trajectory.alpha_bars[-1]))
    # Weights of up to 10 in float32, 20 of them, some through logarithms.
    assert sum(weights) == pytest.approx(sigmas[0] - sigmas[-1], abs=1e-4)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_all_prediction_types_of_one_network_arrive_at_the_same_place(name: str):
    trajectory = spaced_trajectory(SDXL_LEVELS, 20, "trailing")
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def model_output(prediction_type: str):
        def answer(state: Tensor, timesteps: Tensor) -> Tensor:
            level = SDXL_LEVELS[int(timesteps[0])]
            signal, spread = float(level.sqrt()), float((1 - level).sqrt())
            clean = torch.tanh(state)
            noise = (state - signal * clean) / spread
            return {"epsilon": noise, "v_prediction": signal * noise - spread * clean, "sample": clean}[prediction_type]

        return answer

    arrived = [sample(model_output(kind), start, trajectory, kind, sampler=sampler(name)) for kind in PREDICTION_TYPES]
    for other in arrived[1:]:
        # float32 with 1 / a up to 15 and 1 / s up to 5.
        torch.testing.assert_close(other, arrived[0], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_number_of_network_calls_is_the_registered_one_and_the_first_is_at_the_visited_state(name: str):
    trajectory = spaced_trajectory(SDXL_LEVELS, 6, "trailing")
    asked: list[tuple[float, Tensor]] = []
    seen: dict[int, Tensor] = {}

    def recording(state: Tensor, timesteps: Tensor) -> Tensor:
        asked.append((float(timesteps[0]), state))
        return network(state, timesteps)

    start = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sample(recording, start, trajectory, "epsilon", visit=keep_states(range(6), seen), sampler=sampler(name))
    calls = SAMPLERS[name].calls_per_step
    assert len(asked) == 6 * calls - (calls - 1)
    for step, (timestep, state) in enumerate(asked[::calls]):
        assert timestep == trajectory.timesteps[step] and torch.equal(state, seen[step])


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_two_walks_of_one_sampler_do_not_know_of_each_other(name: str):
    trajectory = spaced_trajectory(SDXL_LEVELS, 8, "trailing")
    using, start = sampler(name), torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    first = sample(network, start, trajectory, "epsilon", sampler=using)
    assert torch.equal(first, sample(network, start, trajectory, "epsilon", sampler=using))


def test_sampling_is_ddim_by_default():
    trajectory = spaced_trajectory(SDXL_LEVELS, 8, "trailing")
    start = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    default = sample(network, start, trajectory, "epsilon")
    assert torch.equal(default, sample(network, start, trajectory, "epsilon", sampler=DDIM()))


# PLMS


@pytest.mark.parametrize(
    ("order", "classical"),
    [(1, (1,)), (2, (-1 / 2, 3 / 2)), (3, (5 / 12, -16 / 12, 23 / 12)), (4, (-9 / 24, 37 / 24, -59 / 24, 55 / 24))],
)
def test_even_spacing_gives_the_classical_weights(order: int, classical: tuple[float, ...]):
    nodes = [7 - 0.5 * index for index in range(order)]
    weights = adams_bashforth(nodes, nodes[-1] - 0.5)
    assert weights == pytest.approx([-0.5 * weight for weight in classical], rel=1e-12)


def test_weights_integrate_cubic_polynomials_exactly_over_uneven_nodes():
    nodes, end = (9.0, 4.0, 3.5, 1.0), 0.2
    weights = adams_bashforth(nodes, end)
    for power in range(4):
        exact = (end ** (power + 1) - nodes[-1] ** (power + 1)) / (power + 1)
        assert sum(w * node**power for w, node in zip(weights, nodes, strict=True)) == pytest.approx(exact, rel=1e-10)


def test_plms_of_order_one_is_ddim():
    trajectory = explicit_trajectory(SDXL_LEVELS, [999, 640, 633, 150, 20, 3])
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = sample(network, start, trajectory, "v_prediction", sampler=PLMS(order=1))
    # The same formula in another grouping: float32 with 1 / a up to 15.
    torch.testing.assert_close(ours, sample(network, start, trajectory, "v_prediction"), rtol=0, atol=5e-5)


def test_plms_is_diffusers_pndm_where_sigma_is_linear_in_the_timestep():
    # Only there do PNDM's weights, meant for even timesteps, stand for even sigma. The steps after the start agree, for
    # outputs that ignore the state; the start differs (PNDM repeats its first step), and so does the last (PNDM jumps).
    sigmas = 0.01 * torch.arange(1, 1001, dtype=torch.float64)
    levels = 1 / (1 + sigmas**2)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), levels[:-1]])
    betas = (1 - levels / previous).tolist()
    scheduler: Any = PNDMScheduler(trained_betas=betas, skip_prk_steps=True, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    theirs = [torch.zeros(1, 1, 1, 1)]
    for timestep in scheduler.timesteps:
        model_output = torch.sin(timestep / 100).reshape(1, 1, 1, 1)
        theirs.append(scheduler.step(model_output, timestep, theirs[-1]).prev_sample)
    del theirs[1]
    kept: dict[int, Tensor] = {}
    trajectory = explicit_trajectory(levels, [999 - 50 * index - 49 for index in range(20)])
    assert trajectory.timesteps == tuple(float(timestep) for timestep in scheduler.timesteps.unique().flip(0))
    waves = lambda x, t: x * 0 + torch.sin(t / 100)  # noqa: E731
    sample(waves, theirs[0], trajectory, "epsilon", sampler=PLMS(), visit=keep_states(range(20), kept))
    for step in range(4, 20):
        root, before = (trajectory.alpha_bars[index] ** 0.5 for index in (step, step - 1))
        ours = kept[step] / root - kept[step - 1] / before
        # Differences of z of size 10, from x in float32 and PNDM's own alpha-bar in float32.
        torch.testing.assert_close(ours, theirs[step] / root - theirs[step - 1] / before, rtol=0, atol=2e-4)


@pytest.mark.parametrize("order", [0, 5])
def test_orders_that_plms_lacks_are_refused(order: int):
    trajectory = spaced_trajectory(SDXL_LEVELS, 8, "trailing")
    with pytest.raises(ValueError, match="orders 1 to 4"):
        sample(network, torch.zeros(1, 1, 2, 2), trajectory, "epsilon", sampler=PLMS(order=order))
