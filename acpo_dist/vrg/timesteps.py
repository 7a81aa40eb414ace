"""Between sigma and the timestep that conditions the network: linear in log sigma over the scheduler's levels.

Legend: N denoise steps (noisy to clean), T training timesteps, counted from 0. Source of the rule: Karras et al. 2022,
as diffusers' schedulers apply it.
"""

import logging

import numpy as np
from numpy.typing import ArrayLike

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import FloatArray, checked_schedule, to_sigmas

logger = logging.getLogger(__name__)

EDGE_TOLERANCE = 1e-6
"""In log sigma: a level that went through float32 may stand this far outside the schedule."""


def to_timesteps(sigmas: ArrayLike, alpha_bars_T: ArrayLike) -> FloatArray:
    """Fractional timesteps in [0, T - 1], same shape as `sigmas`; for networks that embed real numbers.

    Raises:
        VrgError: a sigma outside the schedule, where no timestep has it.
    """
    log_sigmas_T = np.log(to_sigmas(checked_schedule(alpha_bars_T)))
    log_sigmas = np.log(np.asarray(sigmas, dtype=np.float64))
    if (
        log_sigmas.min() < log_sigmas_T[0] - EDGE_TOLERANCE or log_sigmas.max() > log_sigmas_T[-1] + EDGE_TOLERANCE
    ):  # a silent clamp would condition the network on a level the sample does not have
        raise VrgError(
            f"sigmas {np.exp(log_sigmas.min()):.6g} to {np.exp(log_sigmas.max()):.6g} leave the scheduler's range "
            f"{np.exp(log_sigmas_T[0]):.6g} to {np.exp(log_sigmas_T[-1]):.6g}.\n"
            "  Pass sigma_min to optimize, or use the scheduler the trajectory was made for."
        )
    return np.interp(log_sigmas, log_sigmas_T, np.arange(len(log_sigmas_T), dtype=np.float64))


def to_integer_timesteps(sigmas: ArrayLike, alpha_bars_T: ArrayLike) -> tuple[int, ...]:
    """N whole timesteps, strictly falling, for schedulers and networks that take integers only.

    Each level is rounded to the nearest timestep. Where two levels fall on one timestep, the cleaner one is moved to
    the next free timestep below (above, at the clean end); a warning says how many were moved.

    Args:
        sigmas: shape (N,), falling.

    Raises:
        VrgError: more levels than timesteps, levels that do not fall, or a level outside the schedule.
    """
    exact = np.atleast_1d(to_timesteps(sigmas, alpha_bars_T))
    total, count = len(np.asarray(alpha_bars_T)), len(exact)
    if count > total:
        raise VrgError(f"{count} levels cannot have {count} different timesteps of {total}.")
    if (np.diff(exact) >= 0).any():
        raise VrgError("whole timesteps need sigmas that fall strictly, from noisy to clean.")
    rounded = np.rint(exact).astype(int)
    steps = np.arange(count)
    # Strictly falling means t_i + i never rises: take the running minimum, then leave room for the steps that follow.
    repaired = np.maximum(np.minimum.accumulate(rounded + steps) - steps, count - 1 - steps)
    moved = int((repaired != rounded).sum())
    if moved:
        logger.warning("%d of %d denoise steps fell on a timestep that was taken; each was moved", moved, count)
    return tuple(int(timestep) for timestep in repaired)
