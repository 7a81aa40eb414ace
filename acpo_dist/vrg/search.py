"""Global minimum of the first-order objective on a grid, as a shortest-path problem.

J is a sum over pairs of neighbouring nodes. N layers, one per denoise step from noisy to clean; each layer is a vector
of candidate sigmas.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from acpo_dist.vrg.levels import FloatArray
from acpo_dist.vrg.table import ErrorTable

Allowed = Callable[[int, FloatArray, FloatArray], NDArray[np.bool_]]
"""(step, sigmas of the step (A, 1), sigmas of the next step (B,)) -> mask of allowed pairs, bool (A, B)."""

FIRST_GRID = 192
ZOOM_GRID = 64
ZOOM_REACH = 10
"""Half width of a zoomed grid around the best path, in spacings of the previous grid."""
NUM_ZOOMS = 3

DESCENT = {"maxiter": 200, "ftol": 1e-10, "gtol": 1e-9}
"""Options of L-BFGS-B after the grid search; tighter tolerances change J by less than 1e-6 (relative)."""


def cheapest_path(
    layers: Sequence[FloatArray],
    table: ErrorTable,
    *,
    sigma_end: float = 0.0,
    allowed: Allowed | None = None,
    start_cost: FloatArray | None = None,
) -> list[int]:
    """Find the path through the layers with the smallest first-order J. Exact; O(N A B).

    Args:
        layers: N vectors of candidate sigmas.
        table: the error table of J.
        sigma_end: sigma after the last step.
        allowed: which pairs of candidates may follow each other; None allows all.
        start_cost: additional cost of each candidate of the noisiest step.

    Returns:
        Index into each layer.

    Raises:
        ValueError: `allowed` excludes every path.
    """
    costs = np.zeros(len(layers[0])) if start_cost is None else start_cost
    origins: list[NDArray[np.intp]] = []
    for step, (noisy, clean) in enumerate(pairwise(layers)):
        # (A, B); (a - b)^2 v(a) + cost so far
        totals = noisy[:, None] - clean
        totals *= totals
        totals *= table.value(noisy)[:, None]
        totals += costs[:, None]
        if allowed is not None:
            totals[~allowed(step, noisy[:, None], clean)] = np.inf
        origin = totals.argmin(axis=0)
        origins.append(origin)
        costs = totals[origin, np.arange(len(clean))]
    costs = costs + (layers[-1] - sigma_end) ** 2 * table.value(layers[-1])
    path = [int(costs.argmin())]
    if not np.isfinite(costs[path[0]]):
        raise ValueError("no path through the layers is allowed")
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    return path[::-1]


def zoomed_path(
    start_N: FloatArray,
    lower_N: FloatArray,
    upper_N: FloatArray,
    table: ErrorTable,
    *,
    sigma_end: float = 0.0,
    allowed: Allowed | None = None,
    start_cost: Callable[[FloatArray], FloatArray] | None = None,
) -> FloatArray:
    """Find the cheapest path on log-spaced grids between the bounds, then on finer grids around the path.

    The first-order objective never exceeds that of `start_N`, because the current nodes are always candidates.

    Args:
        start_N: sigmas of the given trajectory, shape (N,).
        lower_N: lower limits, at most `start_N`. A node whose limits are equal is unchanged bit for bit.
        upper_N: upper limits, at least `start_N`.
        table: the error table of J.
        sigma_end: sigma after the last step.
        allowed: which pairs of candidates may follow each other; None allows all.
        start_cost: additional cost as a function of the sigmas of the noisiest step.

    Returns:
        Sigmas of the path, shape (N,).
    """
    path, low, high = start_N, np.log(lower_N), np.log(upper_N)
    spacing = (high - low) / (FIRST_GRID - 1)
    for zoom in range(NUM_ZOOMS + 1):
        if zoom:
            reach = ZOOM_REACH * spacing
            low = np.maximum(np.log(lower_N), np.log(path) - reach)
            high = np.minimum(np.log(upper_N), np.log(path) + reach)
            spacing = 2 * reach / (ZOOM_GRID - 1)
        grids = np.exp(np.linspace(low, high, ZOOM_GRID if zoom else FIRST_GRID, axis=1))
        layers = [
            np.unique(np.append(grid.clip(floor, ceiling), node)) if floor < ceiling else np.array([node])
            for grid, node, floor, ceiling in zip(grids, path, lower_N, upper_N, strict=True)
        ]
        cost = None if start_cost is None else start_cost(layers[0])
        chosen = cheapest_path(layers, table, sigma_end=sigma_end, allowed=allowed, start_cost=cost)
        path = np.array([layer[index] for layer, index in zip(layers, chosen, strict=True)])
    return path
