"""The `log_trust` search: a trust region in log sigma around the given trajectory, with a fixed noisy end."""

import numpy as np
from scipy.optimize import minimize

from acpo_dist.vrg.levels import FloatArray
from acpo_dist.vrg.objective import cumulative_error, log_gradient, value_and_gradient
from acpo_dist.vrg.responses import Solver
from acpo_dist.vrg.search import DESCENT, zoomed_path
from acpo_dist.vrg.table import ErrorTable


def log_gaps(sigmas_N: FloatArray, sigma_end: float) -> tuple[FloatArray, FloatArray]:
    """Gaps in log sigma between each node and its neighbours.

    Args:
        sigmas_N: decreasing, shape (N,).
        sigma_end: sigma after the last step.

    Returns:
        (gaps to the noisier neighbour, gaps to the cleaner neighbour), each of shape (N,). A node without one of the
        neighbours uses the gap to the other.
    """
    between = -np.diff(np.log(sigmas_N))
    last = [np.log(sigmas_N[-1] / sigma_end)] if sigma_end > 0 else between[-1:]
    return np.append(between[:1], between), np.append(between, last)


def trust_bounds(
    start_N: FloatArray, *, trust: float, lowest: float, sigma_end: float
) -> tuple[FloatArray, FloatArray]:
    """Smallest and largest sigma of each node in the trust region. The noisiest node is fixed.

    Args:
        start_N: sigmas of the given trajectory, decreasing, shape (N,).
        trust: largest move as a share of the gap to the neighbour; below 0.5 the order of the nodes cannot change.
        lowest: lower limit of sigma.
        sigma_end: sigma after the last step.

    Returns:
        (lower, upper), each of shape (N,).
    """
    if len(start_N) == 1:
        return start_N, start_N
    noisier, cleaner = log_gaps(start_N, sigma_end)
    lower = np.maximum(start_N * np.exp(-trust * cleaner), lowest)
    upper = start_N * np.exp(trust * noisier)
    lower[0] = upper[0] = start_N[0]
    return lower, upper


def search_log_trust(
    start_N: FloatArray, table: ErrorTable, *, trust: float, lowest: float, sigma_end: float, solver: Solver
) -> FloatArray:
    """Search the trust region for the trajectory with the smallest J.

    Args:
        start_N: sigmas of the given trajectory, decreasing, shape (N,).
        table: the error table of J.
        trust: see `trust_bounds`.
        lowest: lower limit of sigma.
        sigma_end: sigma after the last step.
        solver: the solver of J.

    Returns:
        Sigmas of the best trajectory, shape (N,); `start_N` if none has a smaller J.
    """
    lower, upper = trust_bounds(start_N, trust=trust, lowest=lowest, sigma_end=sigma_end)
    if (lower == upper).all():
        return start_N
    path = zoomed_path(start_N, lower, upper, table, sigma_end=sigma_end)
    scale = cumulative_error(start_N, table, sigma_end=sigma_end, solver=solver)

    def fall(logs: FloatArray) -> tuple[float, FloatArray]:
        sigmas = np.append(start_N[:1], np.exp(logs))
        value, gradient = value_and_gradient(sigmas, table, sigma_end=sigma_end, solver=solver)
        return value / scale, log_gradient(sigmas, gradient)[1:] / scale

    candidates = [start_N, path]
    bounds = np.log(np.stack([lower, upper], axis=1)[1:])
    for origin in (path, start_N):
        result = minimize(
            fall,
            np.log(origin[1:]).clip(*bounds.T),
            jac=True,
            bounds=bounds,
            method="L-BFGS-B",
            options=DESCENT,
        )
        candidates.append(np.append(start_N[:1], np.exp(result.x)).clip(lower, upper))
    # `min` returns the first of equal candidates, so a trajectory that cannot be improved is returned unchanged.
    return min(candidates, key=lambda nodes: cumulative_error(nodes, table, sigma_end=sigma_end, solver=solver))
