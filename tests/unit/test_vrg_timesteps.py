"""Sigma to timestep and back: round trips, agreement with diffusers, and whole timesteps that never repeat."""

from itertools import pairwise

import numpy as np
import pytest

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import to_sigmas
from acpo_dist.vrg.optimize import optimize
from acpo_dist.vrg.table import ErrorTable
from acpo_dist.vrg.timesteps import to_integer_timesteps, to_timesteps

SDXL_LEVELS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
DDPM_LEVELS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def at_timesteps(timesteps, levels):
    """Sigmas at real timesteps, linear in log sigma."""
    return np.exp(np.interp(timesteps, np.arange(len(levels)), np.log(to_sigmas(levels))))


@pytest.mark.parametrize("levels", [SDXL_LEVELS, DDPM_LEVELS], ids=["sdxl", "ddpm"])
def test_sigmas_survive_the_way_to_timesteps_and_back(levels):
    bounds = to_sigmas(levels[[0, -1]])
    sigmas = np.geomspace(bounds[1], bounds[0], 333)
    np.testing.assert_allclose(at_timesteps(to_timesteps(sigmas, levels), levels), sigmas, rtol=1e-12)
    timesteps = np.random.default_rng(0).uniform(0, 999, 200)
    np.testing.assert_allclose(to_timesteps(at_timesteps(timesteps, levels), levels), timesteps, atol=1e-8)


def test_the_schedulers_own_levels_are_at_its_own_timesteps():
    np.testing.assert_allclose(to_timesteps(to_sigmas(SDXL_LEVELS), SDXL_LEVELS), np.arange(1000), atol=1e-9)
    assert to_integer_timesteps(to_sigmas(SDXL_LEVELS[::-1]), SDXL_LEVELS) == tuple(range(999, -1, -1))


def test_fractional_timesteps_are_those_of_diffusers():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    levels = scheduler.alphas_cumprod.double().numpy()
    sigmas = np.geomspace(14.6, 0.03, 50)
    theirs = [float(scheduler._sigma_to_t(sigma, np.log(to_sigmas(levels)))) for sigma in sigmas]
    np.testing.assert_allclose(to_timesteps(sigmas, levels), theirs, atol=1e-6)


@pytest.mark.parametrize("num_steps", [5, 10, 20, 50])
def test_whole_timesteps_of_optimised_trajectories_fall_strictly_and_are_the_nearest(num_steps: int, caplog):
    nodes = np.geomspace(*to_sigmas(SDXL_LEVELS[[0, -1]]), 16)
    table = ErrorTable(sigmas=nodes, v=0.2 / (0.2 + nodes**2))
    start = to_sigmas(SDXL_LEVELS[[round(1000 - i * 1000 / num_steps) - 1 for i in range(num_steps)]])
    found = optimize(start, table, sigma_min=float(nodes[0]))
    whole = to_integer_timesteps(found.sigmas, SDXL_LEVELS)
    assert all(later < earlier for earlier, later in pairwise(whole))
    assert np.abs(np.array(whole) - to_timesteps(found.sigmas, SDXL_LEVELS)).max() <= 0.5
    assert not caplog.records


@pytest.mark.parametrize(
    ("wanted", "whole", "moved"),
    [
        ([700.2, 700.1, 699.9, 400.0], (700, 699, 698, 400), 2),
        ([2.2, 0.3, 0.2, 0.1], (3, 2, 1, 0), 3),
        ([999.0, 998.9, 998.8], (999, 998, 997), 2),
        ([500.0, 100.4], (500, 100), 0),
    ],
)
def test_levels_that_share_a_timestep_are_moved_to_free_ones_and_counted(wanted, whole, moved: int, caplog):
    assert to_integer_timesteps(at_timesteps(wanted, SDXL_LEVELS), SDXL_LEVELS) == whole
    assert ([record.args for record in caplog.records] == [(moved, len(wanted))]) is (moved > 0)


def test_more_levels_than_timesteps_are_refused():
    with pytest.raises(VrgError, match="12 levels cannot have 12 different timesteps of 10"):
        to_integer_timesteps(at_timesteps(np.linspace(9, 0, 12), SDXL_LEVELS[:10]), SDXL_LEVELS[:10])


def test_levels_that_rise_have_no_whole_timesteps():
    with pytest.raises(VrgError, match="fall strictly"):
        to_integer_timesteps([1.0, 2.0], SDXL_LEVELS)


@pytest.mark.parametrize("sigmas", [[14.7, 1.0], [14.0, 0.029]])
def test_a_level_outside_the_schedule_has_no_timestep(sigmas):
    with pytest.raises(VrgError, match=r"leave the scheduler's range 0\.029"):
        to_timesteps(sigmas, SDXL_LEVELS)


def test_an_end_that_went_through_float32_is_still_inside():
    bounds = to_sigmas(SDXL_LEVELS[[-1, 0]]).astype(np.float32)
    np.testing.assert_allclose(to_timesteps(bounds, SDXL_LEVELS), [999, 0], atol=1e-3)
