"""HSO on a grid: levels from the noise schedule alone, without a measurement of the model.

The inner problem is that of Hierarchical Schedule Optimization (Zhu et al. 2025, arXiv 2511.11688): gaps in log-SNR
that minimise a midpoint estimate of the step errors, from a start in Karras' spacing. The outer problem chooses the
start by the same estimate and a penalty on timesteps that are too close. Two differences to the publication: rho and
the last time are searched on a grid instead of by an evolution strategy, and the first level stays that of the given
trajectory instead of being searched. N denoise steps, T training timesteps.
"""

import numpy as np
from scipy.optimize import minimize

from acpo_dist.vrg.levels import FloatArray, to_sigmas
from acpo_dist.vrg.timesteps import to_timesteps

RHOS = (3.0, 5.0, 7.0, 10.0, 13.0, 16.0)
LAST_TIMES = (0.01, 0.015, 0.02, 0.025, 0.03)
"""Times of the cleanest level, as shares of the schedule."""
_PENALTY = 1e9


def search_hso_grid(first: float, num_steps: int, alpha_bars_T: FloatArray) -> FloatArray:
    """Search the levels of a trajectory for the smallest midpoint error.

    Args:
        first: sigma of the first step, which is kept; finite.
        num_steps: N, at least 1.
        alpha_bars_T: alpha_bar by timestep, shape (T,).

    Returns:
        Decreasing sigmas, shape (N,).
    """
    if num_steps == 1:
        return np.array([first])
    sigmas_T, total = to_sigmas(alpha_bars_T), len(alpha_bars_T)
    ramp = np.linspace(0, 1, num_steps)
    # The publication's smallest gap in time: 0.15 for 4 steps, falling linearly to 0.01 for 20.
    wanted = np.clip(0.15 - 0.14 * (num_steps - 4) / 16, 0.01, 0.15)
    least, best = np.inf, np.array([])
    for rho in RHOS:
        for share in LAST_TIMES:
            last = max(sigmas_T[0], np.interp(share * total - 1, np.arange(total), sigmas_T))
            start = (first ** (1 / rho) * (1 - ramp) + last ** (1 / rho) * ramp) ** rho
            gaps = np.diff(-np.log(start))
            found = minimize(_midpoint_error, np.log(gaps / gaps.sum()), args=(first, last), method="L-BFGS-B")
            sigmas = _levels(found.x, first, last)
            times = (to_timesteps(sigmas, alpha_bars_T) + 1) / total
            fitness = found.fun + _PENALTY * np.square(np.maximum(0, wanted + np.diff(times))).sum()
            if fitness < least:
                least, best = fitness, sigmas
    return best


def _levels(parameters: FloatArray, first: float, last: float) -> FloatArray:
    """Levels whose gaps in log sigma are the softmax of the parameters (N - 1,); both ends are exact."""
    share = np.exp(parameters - parameters.max())
    at = np.concatenate([[0.0], np.cumsum(share / share.sum())])
    return np.array([first, *np.exp(np.log(first) * (1 - at[1:-1]) + np.log(last) * at[1:-1]), last])


def _midpoint_error(parameters: FloatArray, first: float, last: float) -> float:
    """Sum over steps of sigma^2 / alpha at the midpoint in log-SNR, times the step in alpha / sigma."""
    ratio = _levels(parameters, first, last)
    middle = np.sqrt(ratio[:-1] * ratio[1:])
    alpha = 1 / np.sqrt(1 + middle**2)
    return float(((middle * alpha) ** 2 / alpha * np.diff(1 / ratio)).sum())
