"""The objective and its gradients, against sums written out by hand and against central differences."""

import math

import numpy as np
import pytest

from acpo_dist.vrg.levels import to_alpha_bars, to_sigmas
from acpo_dist.vrg.objective import (
    alpha_gradient,
    cumulative_error,
    log_gradient,
    to_alphas,
    value_and_gradient,
)
from acpo_dist.vrg.responses import SOLVERS, ddim, first_order
from acpo_dist.vrg.table import ErrorTable
from tests.helpers.vrg import alpha_form

NODES = np.geomspace(0.01, 157, 16)
TABLE = ErrorTable(sigmas=NODES, v=0.25 / (0.25 + NODES**2) + 0.01 / (1 + NODES))
STOCHASTIC = {"ddim_eta_0.5": ddim(0.5), "ddim_eta_1": ddim(1.0)}


def random_trajectory(seed: int, num_steps: int) -> np.ndarray:
    """Log-uniform levels, at least 1 % apart."""
    draws = np.random.default_rng(seed).uniform(0.02, 1, num_steps + 1).cumsum()
    return np.exp(np.log(100) + (draws[:-1] - draws[0]) / (draws[-1] - draws[0]) * np.log(0.05 / 100))


def central_differences(function, where: np.ndarray) -> np.ndarray:
    """Fourth order: the error of the formula is below that of rounding."""
    slopes = []
    for step in np.diag(2e-4 * where):
        near = function(where + step) - function(where - step)
        far = function(where + 2 * step) - function(where - 2 * step)
        slopes.append((8 * near - far) / (12 * step.sum()))
    return np.array(slopes)


@pytest.mark.parametrize("seed", range(5))
def test_the_objective_is_the_sum_over_steps_and_equals_its_alpha_form(seed: int):
    sigmas = random_trajectory(seed, 12)
    by_hand = math.fsum(
        (sigma - following) ** 2 * float(TABLE.value(sigma))
        for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True)
    )
    assert cumulative_error(sigmas, TABLE) == pytest.approx(by_hand, rel=1e-13)
    assert alpha_form(to_alpha_bars(sigmas), TABLE) == pytest.approx(by_hand, rel=1e-12)


def test_the_end_of_the_last_step_counts():
    assert cumulative_error([3.0, 1.0], TABLE, sigma_end=0.25) == pytest.approx(
        4 * float(TABLE.value(3.0)) + 0.75**2 * float(TABLE.value(1.0)), rel=1e-14
    )


@pytest.mark.parametrize("interpolation", ["log_cubic", "linear_alpha_bar"])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_derivative_in_sigma_log_sigma_and_alpha(seed: int, interpolation):
    table = TABLE.with_interpolation(interpolation)
    sigmas = random_trajectory(seed, 9)
    levels = to_alpha_bars(sigmas)
    value, gradient = value_and_gradient(sigmas, table)
    assert value == cumulative_error(sigmas, table)

    def of_alphas(alphas):
        return cumulative_error(to_sigmas(np.cumprod(alphas[::-1])[::-1]), table)

    comparisons = [
        (gradient, lambda at: cumulative_error(at, table), sigmas),
        (alpha_gradient(levels, gradient), of_alphas, to_alphas(levels)),
    ]
    for analytic, function, where in comparisons:
        # Both curves have kinks in their second derivative or slope at the nodes; no node lies within a step here.
        differences = central_differences(function, where)
        np.testing.assert_allclose(analytic, differences, rtol=1e-6, atol=1e-6 * np.abs(differences).max())
    in_logs = central_differences(lambda logs: cumulative_error(np.exp(logs), table), np.log(sigmas))
    np.testing.assert_allclose(log_gradient(sigmas, gradient), in_logs, rtol=1e-6, atol=1e-6 * np.abs(in_logs).max())


@pytest.mark.parametrize("solver", [*SOLVERS.values(), *STOCHASTIC.values()], ids=lambda solver: solver.name)
@pytest.mark.parametrize(("num_steps", "sigma_end"), [(1, 0.0), (2, 0.01), (7, 0.0), (9, 0.02), (17, 0.0)])
def test_the_gradient_is_right_for_every_solver(solver, num_steps: int, sigma_end: float):
    sigmas = random_trajectory(3, num_steps)
    value, gradient = value_and_gradient(sigmas, TABLE, sigma_end=sigma_end, solver=solver)
    assert value == cumulative_error(sigmas, TABLE, sigma_end=sigma_end, solver=solver)
    differences = central_differences(
        lambda at: cumulative_error(at, TABLE, sigma_end=sigma_end, solver=solver), sigmas
    )
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-6 * np.abs(differences).max())


def test_a_plain_function_is_differentiated_numerically():
    sigmas = random_trajectory(4, 8)
    _, analytic = value_and_gradient(sigmas, TABLE, solver="dpm_2m")

    def plain(nodes, sigma_end):
        return SOLVERS["dpm_2m"].respond(np.asarray(nodes, dtype=np.float64), sigma_end)  # complex numbers would warn

    _, numeric = value_and_gradient(sigmas, TABLE, solver=plain)
    np.testing.assert_allclose(numeric, analytic, rtol=1e-6, atol=1e-6 * np.abs(analytic).max())


def test_weights_that_do_not_depend_on_the_trajectory_leave_the_slope_of_the_table():
    sigmas = random_trajectory(5, 6)
    _, gradient = value_and_gradient(sigmas, TABLE, solver=lambda nodes, _: np.full_like(nodes, 3.0))
    np.testing.assert_allclose(gradient, 9 * TABLE.value_and_slope(sigmas)[1], rtol=1e-12)


def test_the_closed_form_of_first_order_is_what_the_complex_step_gives():
    sigmas = random_trajectory(6, 20)
    _, closed = value_and_gradient(sigmas, TABLE)
    _, stepped = value_and_gradient(sigmas, TABLE, solver=ddim(0.0))
    assert SOLVERS["first_order"].respond is first_order
    np.testing.assert_allclose(closed, stepped, rtol=1e-10, atol=1e-10 * np.abs(closed).max())
