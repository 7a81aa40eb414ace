"""The objective of Variance-Reduction Guidance: the prediction error accumulated along a trajectory.

    J(s) = sum_i W_i(s)^2 v(s_i)

The errors of different steps are assumed to be uncorrelated with zero mean. W is the solver's response with eps frozen
(`acpo_dist.vrg.responses`). J ranks trajectories with the same number of steps and the same noisy end. It is not a
calibrated error and cannot compare trajectories with different numbers of steps.

N denoise steps from noisy to clean. Gradients are with respect to the N sigmas unless stated otherwise.
"""

import numpy as np
from numpy.typing import ArrayLike

from acpo_dist.vrg.levels import FloatArray, to_sigmas
from acpo_dist.vrg.responses import Response, Solver, as_solver, first_order
from acpo_dist.vrg.table import ErrorTable

COMPLEX_STEP = 1e-30
"""Relative step of complex-step differentiation, which has no cancellation error and allows a very small step."""
DIFFERENCE_STEP = 1e-5
"""Relative step of central differences for real-valued solvers: balances truncation error against rounding."""


def cumulative_error(
    sigmas_N: ArrayLike, table: ErrorTable, *, sigma_end: float = 0.0, solver: str | Solver | Response = "first_order"
) -> float:
    """J of a trajectory, in units of v times sigma squared.

    Args:
        sigmas_N: decreasing, all above `sigma_end`, shape (N,).
        table: the error table.
        sigma_end: sigma after the last step.
        solver: a name in `responses.SOLVERS`, a `Solver`, or a response function.

    Returns:
        J.
    """
    sigmas = np.asarray(sigmas_N, dtype=np.float64)
    weights = as_solver(solver).respond(sigmas, sigma_end)
    return float(weights**2 @ table.value(sigmas))


def value_and_gradient(
    sigmas_N: ArrayLike, table: ErrorTable, *, sigma_end: float = 0.0, solver: str | Solver | Response = "first_order"
) -> tuple[float, FloatArray]:
    """J and its gradient with respect to the sigmas.

    The gradient is in closed form for the first-order solver, by complex step for analytic solvers, and by central
    differences otherwise. Arguments as in `cumulative_error`.

    Returns:
        (J, dJ/ds of shape (N,)).
    """
    sigmas = np.asarray(sigmas_N, dtype=np.float64)
    solver = as_solver(solver)
    value, slope = table.value_and_slope(sigmas)
    weights = solver.respond(sigmas, sigma_end)
    pull = 2 * weights * value
    if solver.respond is first_order:
        gradient = pull.copy()
        gradient[1:] -= pull[:-1]
    else:
        gradient = _response_jacobian(sigmas, sigma_end, solver) @ pull
    return float(weights**2 @ value), gradient + weights**2 * slope


def log_gradient(sigmas_N: FloatArray, gradient_N: FloatArray) -> FloatArray:
    """Convert dJ/ds to dJ / d log s."""
    return sigmas_N * gradient_N


def alpha_gradient(alpha_bars_N: FloatArray, gradient_N: FloatArray) -> FloatArray:
    """Convert dJ/ds to dJ / d alpha. alpha_i is alpha_bar_i over the next cleaner alpha_bar (1 for the last level).

    A change of alpha_i scales the alpha_bar of level i and of every noisier level.
    """
    # d s / d alpha_bar = -1 / (2 s alpha_bar^2)
    level_gradient = -gradient_N / (2 * to_sigmas(alpha_bars_N) * alpha_bars_N**2)
    return np.cumsum(alpha_bars_N * level_gradient) / to_alphas(alpha_bars_N)


def to_alphas(alpha_bars_N: FloatArray) -> FloatArray:
    """Ratios of neighbouring alpha_bars, noisy over clean, shape (N,); the last alpha_bar is divided by 1."""
    return alpha_bars_N / np.append(alpha_bars_N[1:], 1.0)


def _response_jacobian(sigmas: FloatArray, sigma_end: float, solver: Solver) -> FloatArray:
    """d W_k / d s_i in row i, column k."""
    if solver.analytic:
        steps = COMPLEX_STEP * sigmas
        return np.imag(solver.respond(sigmas + 1j * np.diag(steps), sigma_end)) / steps[:, None]
    rows = []
    for moved in np.diag(DIFFERENCE_STEP * sigmas):
        rise = solver.respond(sigmas + moved, sigma_end) - solver.respond(sigmas - moved, sigma_end)
        rows.append(rise / (2 * moved.sum()))
    return np.stack(rows)
