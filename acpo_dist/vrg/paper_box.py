"""The `paper_box` search: global minimum of the publication's loss in its box constraints.

    alpha_i = alpha_i0 + w_i o_i, |o_i| <= 1, w_i = min(lp, 1 - alpha_i0, alpha_i0)
    loss = J + reg_lambda (alpha_bar_N - alpha_bar_N0)^2, N the noisiest

Arrays are in sampling order: index 0 is the noisiest level, and alpha_i is alpha_bar_i divided by the next cleaner
alpha_bar (1 for the last). Source: the public description of Variance-Reduction Guidance (ICME 2025).
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from acpo_dist.vrg.levels import FloatArray, to_alpha_bars, to_sigmas
from acpo_dist.vrg.objective import alpha_gradient, cumulative_error, to_alphas, value_and_gradient
from acpo_dist.vrg.responses import Solver
from acpo_dist.vrg.search import DESCENT, zoomed_path
from acpo_dist.vrg.table import ErrorTable

INSIDE = 1 - 1e-6
"""Share of the box width that is used, so that no alpha is 0 or 1; the publication's tanh does not reach 1 either."""
FLOOR = 0.02
"""Smallest sigma of the grid, relative to the given node, if the box allows sigma = 0."""
EDGE_SLACK = 1e-12
"""Relative tolerance of the box for the rounding of the conversions between alpha and sigma."""


def box_bounds(start_N: FloatArray, *, lp: float, lowest: float) -> tuple[FloatArray, FloatArray]:
    """Smallest and largest alpha of each step.

    Args:
        start_N: sigmas of the given trajectory, decreasing, shape (N,).
        lp: largest change of alpha.
        lowest: lower limit of sigma; 0 is no limit.

    Returns:
        (lower, upper), each of shape (N,).
    """
    alphas = to_alphas(to_alpha_bars(start_N))
    width = INSIDE * np.minimum(lp, np.minimum(1 - alphas, alphas))
    upper = alphas + width
    upper[-1] = min(upper[-1], float(to_alpha_bars(lowest)))  # lowest = 0 is alpha_bar = 1: no limit
    return alphas - width, np.maximum(upper, alphas)


def search_paper_box(
    start_N: FloatArray, table: ErrorTable, *, lp: float, reg_lambda: float, lowest: float, solver: Solver
) -> FloatArray:
    """Search the box for the trajectory with the smallest loss of the publication.

    Args:
        start_N: sigmas of the given trajectory, decreasing, shape (N,).
        table: the error table of J.
        lp: largest change of alpha.
        reg_lambda: weight of the squared change of the noisiest alpha_bar.
        lowest: lower limit of sigma; 0 is no limit.
        solver: the solver of J.

    Returns:
        Sigmas of the best trajectory, shape (N,); `start_N` if none has a smaller loss.
    """
    lower, upper = box_bounds(start_N, lp=lp, lowest=lowest)
    noisy_end = float(to_alpha_bars(start_N[0]))

    def penalty(sigmas: FloatArray) -> FloatArray:
        return reg_lambda * (to_alpha_bars(sigmas) - noisy_end) ** 2

    def loss(sigmas: FloatArray) -> float:
        return cumulative_error(sigmas, table, solver=solver) + float(penalty(sigmas[0]))

    def in_box(step: int, noisy: FloatArray, clean: FloatArray) -> NDArray[np.bool_]:
        ratio = (1 + clean * clean) / (1 + noisy * noisy)
        return (ratio >= lower[step] * (1 - EDGE_SLACK)) & (ratio <= upper[step] * (1 + EDGE_SLACK))

    reach = [to_sigmas(np.cumprod(bound[::-1])[::-1]) for bound in (upper, lower)]
    lowest_N = np.maximum(np.minimum(np.maximum(reach[0], FLOOR * start_N), start_N), lowest)
    path = zoomed_path(start_N, lowest_N, np.maximum(reach[1], start_N), table, allowed=in_box, start_cost=penalty)
    candidates = [start_N, path]
    for origin in (path, start_N):
        candidates.append(_polish(origin, lower, upper, table, reg_lambda, noisy_end, solver))
    return min(candidates, key=loss)


def _polish(
    origin_N: FloatArray,
    lower: FloatArray,
    upper: FloatArray,
    table: ErrorTable,
    reg_lambda: float,
    noisy_end: float,
    solver: Solver,
) -> FloatArray:
    """Minimise the loss with L-BFGS-B; the variables are the alphas scaled from their box to [-1, 1]."""
    middle, half = (upper + lower) / 2, (upper - lower) / 2

    def levels(position: FloatArray) -> FloatArray:
        return np.multiply.accumulate((middle + half * position)[::-1])[::-1]

    def loss(position: FloatArray) -> tuple[float, FloatArray]:
        alpha_bars = levels(position)
        value, gradient = value_and_gradient(to_sigmas(alpha_bars), table, solver=solver)
        slope = alpha_gradient(alpha_bars, gradient)
        drift = alpha_bars[0] - noisy_end
        # alpha_bar of the noisiest level is the product of all alpha.
        slope += 2 * reg_lambda * drift * alpha_bars[0] / (middle + half * position)
        return value + reg_lambda * drift**2, slope * half

    origin = ((to_alphas(to_alpha_bars(origin_N)) - middle) / half).clip(-1, 1)
    result = minimize(
        loss,
        origin,
        jac=True,
        bounds=[(-1.0, 1.0)] * len(origin),
        method="L-BFGS-B",
        options=DESCENT,
    )
    return to_sigmas(levels(result.x))
