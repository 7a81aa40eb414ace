"""The trajectory objective in the notation of the publication, for comparison."""

import numpy as np
from numpy.typing import ArrayLike

from acpo_dist.vrg.levels import to_sigmas
from acpo_dist.vrg.objective import to_alphas
from acpo_dist.vrg.table import ErrorTable


def alpha_form(alpha_bars_N: ArrayLike, table: ErrorTable) -> float:
    """J of the first-order solver with a clean end, in the notation of the publication.

    sum_i (sqrt(1 - ab_i) - sqrt(alpha_i - ab_i))^2 / ab_i v_i
    """
    levels = np.asarray(alpha_bars_N, dtype=np.float64)
    weights = (np.sqrt(1 - levels) - np.sqrt(to_alphas(levels) - levels)) ** 2 / levels
    return float(weights @ table.value(to_sigmas(levels)))
