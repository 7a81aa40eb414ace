"""The responses of solvers, against diffusers' own schedulers fed with one-hot network outputs."""

import math

import numpy as np
import pytest
import torch

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import to_sigmas
from acpo_dist.vrg.responses import SOLVERS, as_solver, ddim, first_order, probe

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDXL_LEVELS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def uneven(num_steps: int, seed: int = 0) -> np.ndarray:
    """SDXL's range in uneven steps, which an off-by-one in the history of outputs cannot survive."""
    gaps = np.random.default_rng(seed).uniform(0.3, 1.7, num_steps).cumsum()
    return 14.61 * np.exp(-(gaps - gaps[0]) / (gaps[-1] - gaps[0] + 1e-9) * np.log(14.61 / 0.05))


def on_trajectory(scheduler, sigmas: np.ndarray, sigma_end: float):
    """The scheduler on arbitrary levels, in float64: by default it would round them to float32."""
    scheduler.set_timesteps(len(sigmas))
    scheduler.sigmas = torch.tensor([*sigmas, sigma_end], dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(sigmas), 0, -1, dtype=torch.float32)
    scheduler.set_begin_index(0)

    def step(index: int, outputs: np.ndarray, states: np.ndarray) -> np.ndarray:
        result = scheduler.step(
            torch.from_numpy(outputs.copy()), scheduler.timesteps[index], torch.from_numpy(states.copy())
        )
        return result.prev_sample.double().numpy()

    return step


# diffusers has no noise form that ends clean.
MULTISTEP = [
    *((name, 0.0292) for name in ("first_order", "dpm_2m", "dpm_3m", "dpmpp_2m", "dpmpp_3m")),
    *((name, 0.0) for name in ("first_order", "dpmpp_2m", "dpmpp_3m")),
]


@pytest.mark.parametrize("num_steps", [2, 3, 4, 9, 14, 15, 20])
@pytest.mark.parametrize(("name", "sigma_end"), MULTISTEP)
def test_multistep_weights_are_those_of_the_diffusers_scheduler(name: str, num_steps: int, sigma_end: float):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **BETAS,
        solver_order=1 if name == "first_order" else int(name[-2]),
        algorithm_type="dpmsolver" if name.startswith("dpm_") else "dpmsolver++",
        final_sigmas_type="sigma_min" if sigma_end else "zero",
    )
    sigmas = uneven(num_steps)
    theirs = probe(on_trajectory(scheduler, sigmas, sigma_end), num_steps, to_z=math.hypot(1, sigma_end))
    # The scheduler rounds its state to float32 at every step: 20 times 6e-8 of states up to the sum of weights.
    np.testing.assert_allclose(SOLVERS[name].respond(sigmas, sigma_end), theirs, rtol=0, atol=1e-6 * sigmas[0])


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("num_steps", [2, 3, 4, 5, 6, 7, 8, 9, 20])
def test_single_step_weights_are_those_of_the_diffusers_scheduler(order: int, num_steps: int):
    from diffusers import DPMSolverSinglestepScheduler

    scheduler = DPMSolverSinglestepScheduler(
        **BETAS, solver_order=order, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", lower_order_final=True
    )
    sigmas = uneven(num_steps)
    theirs = probe(on_trajectory(scheduler, sigmas, 0.0292), num_steps, to_z=math.hypot(1, 0.0292))
    ours = SOLVERS[f"dpm_single_{order}"].respond(sigmas, 0.0292)
    # float64 on both sides here.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * sigmas[0])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [5, 25])
def test_ddim_weights_are_those_of_the_diffusers_scheduler_at_every_eta(eta: float, num_steps: int):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    scheduler.alphas_cumprod = torch.from_numpy(SDXL_LEVELS)
    timesteps = scheduler.timesteps

    def step(index: int, outputs: np.ndarray, states: np.ndarray) -> np.ndarray:
        output, state = torch.from_numpy(outputs.copy()), torch.from_numpy(states.copy())
        quiet = torch.zeros_like(state)
        return scheduler.step(output, int(timesteps[index]), state, eta=eta, variance_noise=quiet).prev_sample.numpy()

    sigmas = to_sigmas(SDXL_LEVELS[timesteps.numpy()])
    # diffusers keeps the last alpha_bar, 1, in float32, which is exact; the rest is float64.
    np.testing.assert_allclose(ddim(eta).respond(sigmas, 0.0), probe(step, num_steps), rtol=1e-9, atol=1e-10)


def test_euler_has_the_weights_of_first_order_in_its_own_units():
    from diffusers import EulerDiscreteScheduler

    sigmas = uneven(10)
    step = on_trajectory(EulerDiscreteScheduler(**BETAS), sigmas, 0.0)
    # float32 states; Euler's are z itself.
    np.testing.assert_allclose(first_order(sigmas, 0.0), probe(step, 10), rtol=0, atol=1e-6 * sigmas[0])


@pytest.mark.parametrize("sigma_end", [0.0, 0.01])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 12, 40])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_constant_error_moves_the_end_by_the_whole_fall_of_sigma(name: str, num_steps: int, sigma_end: float):
    sigmas = uneven(num_steps)
    total = SOLVERS[name].respond(sigmas, sigma_end).sum()
    assert total == pytest.approx(sigmas[0] - sigma_end, rel=1e-11)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_batch_of_trajectories_gives_the_weights_of_each(name: str):
    batch = np.stack([uneven(9, seed) for seed in range(4)])
    weights = SOLVERS[name].respond(batch, 0.0)
    for row, sigmas in zip(weights, batch, strict=True):
        np.testing.assert_allclose(row, SOLVERS[name].respond(sigmas, 0.0), rtol=1e-13, atol=1e-13)


def test_noise_gives_errors_more_weight_and_without_it_ddim_is_first_order():
    sigmas = uneven(8)
    np.testing.assert_allclose(ddim(0.0).respond(sigmas, 0.0), first_order(sigmas, 0.0), rtol=1e-14)
    following = np.append(sigmas[1:], 0.0)
    np.testing.assert_allclose(ddim(1.0).respond(sigmas, 0.0), (sigmas**2 - following**2) / sigmas, rtol=1e-12)
    assert (ddim(0.5).respond(sigmas, 0.0)[:-1] > first_order(sigmas, 0.0)[:-1]).all()


def test_a_probe_finds_the_weights_of_a_recursion_written_by_hand():
    def step(index: int, outputs: np.ndarray, states: np.ndarray) -> np.ndarray:
        return 0.5 * states - (index + 1) * outputs

    # After three steps, halved at each: 1/4 of 1, 1/2 of 2, all of 3.
    assert probe(step, 3, to_z=2.0).tolist() == [0.5, 2.0, 6.0]


@pytest.mark.parametrize("kind", ["clipping", "noise"])
def test_a_scheduler_that_is_not_linear_is_refused(kind: str):
    rng = np.random.default_rng(0)

    def step(index: int, outputs: np.ndarray, states: np.ndarray) -> np.ndarray:
        states = states - outputs
        return states.clip(-1, 1) if kind == "clipping" else states + rng.normal(size=states.shape)

    with pytest.raises(VrgError, match="not linear"):
        probe(step, 6)


def test_unknown_solvers_and_values_of_eta_are_refused():
    with pytest.raises(VrgError, match="'heun'; known: first_order, dpm_2m"):
        as_solver("heun")
    with pytest.raises(VrgError, match=r"eta must be in \[0, 1\], found 1.5"):
        ddim(1.5)
