"""Noise levels as `alpha_bar` and as `sigma`, in float64.

`alpha_bar` is the cumulative signal fraction in (0, 1). `sigma = sqrt(1 / alpha_bar - 1)` is the noise-to-signal ratio,
called `sigmas` in diffusers; it is infinite at alpha_bar 0, the first level of flow models. N denoise steps, K table
nodes, T training timesteps. Sequences of length N are in sampling order, from noisy to clean: sigma decreases,
alpha_bar increases.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from acpo_dist.core.errors import VrgError

FloatArray = NDArray[np.float64]


def to_sigmas(alpha_bars: ArrayLike) -> FloatArray:
    """Convert alpha_bars to noise-to-signal ratios of the same shape."""
    levels = np.asarray(alpha_bars, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - levels) / levels)


def to_alpha_bars(sigmas: ArrayLike) -> FloatArray:
    """Convert sigmas to cumulative signal fractions of the same shape."""
    sigmas = np.asarray(sigmas, dtype=np.float64)
    return 1 / (1 + sigmas * sigmas)


def checked_schedule(alpha_bars_T: ArrayLike) -> FloatArray:
    """Check the noise levels of a scheduler and convert them to float64.

    Args:
        alpha_bars_T: alpha_bar by timestep, shape (T,).

    Returns:
        The same values as float64, shape (T,).

    Raises:
        VrgError: not a vector, a level outside (0, 1) (the last one may be 0), or levels that do not decrease with
            the timestep.
    """
    levels = np.asarray(alpha_bars_T, dtype=np.float64)
    if levels.ndim != 1 or len(levels) < 2:
        raise VrgError(f"a schedule is a vector of at least 2 alpha_bars, found the shape {levels.shape}.")
    if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() < 1):
        raise VrgError(
            f"the scheduler's alpha_bars must lie in (0, 1), found {levels.min():g} to {levels.max():g}.\n"
            "  Only the last one may be 0, where a flow model starts."
        )
    if (np.diff(levels) >= 0).any():
        raise VrgError("the scheduler's alpha_bars must fall strictly with the timestep (alphas_cumprod in diffusers).")
    return levels


def finite_levels(alpha_bars_T: FloatArray) -> FloatArray:
    """Return the levels of a schedule whose sigma is finite: all of them, or all but the last one."""
    return alpha_bars_T if alpha_bars_T[-1] > 0 else alpha_bars_T[:-1]


def checked_sigmas(sigmas: ArrayLike, sigma_end: float = 0.0) -> FloatArray:
    """Check the sigmas of a trajectory and return them in sampling order.

    Args:
        sigmas: shape (N,), strictly monotone. An increasing sequence (clean to noisy, as in files) is reversed.
        sigma_end: sigma after the last step.

    Returns:
        Decreasing sigmas as float64, shape (N,).

    Raises:
        VrgError: not a vector of finite numbers, not strictly monotone, or a sigma not above `sigma_end`.
    """
    sigmas = np.array(sigmas, dtype=np.float64)
    if sigmas.ndim != 1 or not len(sigmas) or not np.isfinite(sigmas).all():
        raise VrgError(f"a trajectory is a vector of finite sigmas, found {sigmas!r}.")
    if sigmas[0] < sigmas[-1]:
        sigmas = sigmas[::-1].copy()
    if (np.diff(sigmas) >= 0).any():
        at = int(np.argmax(np.diff(sigmas) >= 0))
        raise VrgError(
            f"the sigmas of a trajectory must be strictly monotone, found {sigmas[at]:g} and then {sigmas[at + 1]:g}."
        )
    if not (sigma_end >= 0 and sigmas[-1] > sigma_end):
        raise VrgError(f"the cleanest sigma must exceed sigma_end >= 0, found {sigmas[-1]:g} and {sigma_end:g}.")
    return sigmas
