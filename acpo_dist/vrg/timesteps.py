"""Convert sigma to the timestep that conditions the network, by linear interpolation in log sigma.

In a schedule that ends without signal (a flow model's) log sigma is infinite at the end; the interpolation is then in
s / (a + s) = sigma / (1 + sigma), in which a flow model's timesteps are even, so that it is exact.

N denoise steps (noisy to clean), T training timesteps, 0-based. Source: Karras et al. 2022, as implemented in
diffusers' schedulers.
"""

import logging

import numpy as np
from numpy.typing import ArrayLike

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import FloatArray, checked_schedule, to_sigmas

logger = logging.getLogger(__name__)

EDGE_TOLERANCE = 1e-6
"""Tolerance in log sigma at the ends of the schedule, for levels that were rounded to float32."""


def to_timesteps(sigmas: ArrayLike, alpha_bars_T: ArrayLike) -> FloatArray:
    """Convert sigmas to fractional timesteps, for networks that accept non-integer timesteps.

    Args:
        sigmas: any shape.
        alpha_bars_T: alpha_bar by timestep, shape (T,).

    Returns:
        Timesteps in [0, T - 1], same shape as `sigmas`.

    Raises:
        VrgError: a sigma is outside the schedule.
    """
    sigmas, sigmas_T = np.asarray(sigmas, dtype=np.float64), to_sigmas(checked_schedule(alpha_bars_T))
    if np.isinf(sigmas_T[-1]):
        at, grid = 1 - 1 / (1 + sigmas), 1 - 1 / (1 + sigmas_T)
    else:
        at, grid = np.log(sigmas), np.log(sigmas_T)
    # Clamping would condition the network on a noise level that differs from the sample's.
    if at.min() < grid[0] - EDGE_TOLERANCE or at.max() > grid[-1] + EDGE_TOLERANCE:
        raise VrgError(
            f"sigmas {sigmas.min():.6g} to {sigmas.max():.6g} leave the scheduler's range {sigmas_T[0]:.6g} to "
            f"{sigmas_T[-1]:.6g}.\n"
            "  Pass sigma_min to optimize, or use the scheduler the trajectory was made for."
        )
    return np.interp(at, grid, np.arange(len(grid), dtype=np.float64))


def to_integer_timesteps(sigmas: ArrayLike, alpha_bars_T: ArrayLike) -> tuple[int, ...]:
    """Convert sigmas to strictly decreasing integer timesteps, for schedulers and networks that accept integers only.

    Each level is rounded to the nearest timestep. If two levels round to the same timestep, the cleaner one moves to
    the next free timestep below (above, at the clean end). A warning with the number of moved levels is logged.

    Args:
        sigmas: shape (N,), decreasing.
        alpha_bars_T: alpha_bar by timestep, shape (T,).

    Returns:
        N timesteps.

    Raises:
        VrgError: more levels than timesteps, sigmas that do not decrease, or a sigma outside the schedule.
    """
    exact = np.atleast_1d(to_timesteps(sigmas, alpha_bars_T))
    total, count = len(np.asarray(alpha_bars_T)), len(exact)
    if count > total:
        raise VrgError(f"{count} levels cannot have {count} different timesteps of {total}.")
    if (np.diff(exact) >= 0).any():
        raise VrgError("whole timesteps need sigmas that fall strictly, from noisy to clean.")
    rounded = np.rint(exact).astype(int)
    steps = np.arange(count)
    # t is strictly decreasing if t_i + i is non-increasing: take the running minimum, then reserve the remaining steps.
    repaired = np.maximum(np.minimum.accumulate(rounded + steps) - steps, count - 1 - steps)
    moved = int((repaired != rounded).sum())
    if moved:
        logger.warning("%d of %d denoise steps fell on a timestep that was taken; each was moved", moved, count)
    return tuple(int(timestep) for timestep in repaired)
