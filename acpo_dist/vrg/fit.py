"""Check that an error table matches the noise schedule of a scheduler. K nodes, T training timesteps."""

from typing import TYPE_CHECKING

import numpy as np

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import FloatArray, finite_levels, to_alpha_bars, to_sigmas

if TYPE_CHECKING:
    from acpo_dist.vrg.table import ErrorTable

LEVEL_TOLERANCE = 0.02
"""Maximum difference in log sigma per node. Rounding alpha_bar = 4e-5 to six decimals changes it by up to 0.006."""
RANGE_TOLERANCE = 0.1
"""Maximum distance between the first (last) node and the end of the schedule, as a share of its log sigma range."""
LABEL_TOLERANCE = 2e-6
"""Maximum difference in alpha; the published columns have six decimals."""


def check_fit(table: "ErrorTable", levels_T: FloatArray) -> None:
    """Check that the nodes of a table are noise levels of the schedule.

    The range of sigma is always compared. If the table has timesteps (0-based or 1-based), each node is compared too.

    Args:
        table: the error table.
        levels_T: alpha_bar by timestep, float64, shape (T,), decreasing.

    Raises:
        VrgError: the table does not match the schedule.
    """
    # Tables have no node at pure noise, where sigma is infinite.
    levels_T = finite_levels(levels_T)
    if table.timesteps is not None:
        _check_nodes(table, levels_T)
    _check_range(table, levels_T)


def _check_nodes(table: "ErrorTable", levels_T: FloatArray) -> None:
    assert table.timesteps is not None
    grid, log_sigmas_T = np.arange(len(levels_T)), np.log(to_sigmas(levels_T))
    readings = []
    for first_timestep in (0, 1):
        at = table.timesteps - first_timestep
        if at.min() < 0 or at.max() > len(levels_T) - 1:
            continue
        wanted = np.interp(at, grid, log_sigmas_T)
        readings.append((np.abs(np.log(table.sigmas) - wanted), wanted, at))
    if not readings:
        raise VrgError(
            f"{_name(table)} has timesteps {table.timesteps.min():g} to {table.timesteps.max():g}, but the scheduler "
            f"has {len(levels_T)}, counted from 0 or 1.\n  Measure a table for this scheduler."
        )
    distance, wanted, at = min(readings, key=lambda reading: float(reading[0].max()))
    if distance.max() <= LEVEL_TOLERANCE:
        return
    worst = int(distance.argmax())
    found = (
        f"{_name(table)} does not fit the scheduler: at timestep {table.timesteps[worst]:g} alpha_bar should be "
        f"{to_alpha_bars(np.exp(wanted[worst])):.6f}, found {table.alpha_bars[worst]:.6f}."
    )
    alphas_T = np.concatenate([levels_T[:1], levels_T[1:] / levels_T[:-1]])
    for _, _, candidate in readings:
        label_error = float(np.abs(np.interp(candidate, grid, alphas_T) - table.alpha_bars).max())
        if label_error <= LABEL_TOLERANCE:
            raise VrgError(
                f"{found}\n  The column holds alpha_t = 1 - beta_t (equal to within {label_error:.0e}), not alpha_bar, "
                "the product of all alpha up to t.\n  Rebuild it with `table.on_schedule(alpha_bars_T, "
                f"first_timestep={int(table.timesteps[0] - candidate[0])})`."
            )
    raise VrgError(f"{found}\n  Use the scheduler that the table was measured with, or measure a new table.")


def _check_range(table: "ErrorTable", levels_T: FloatArray) -> None:
    clean, noisy = np.log(to_sigmas(levels_T[[0, -1]]))
    slack = RANGE_TOLERANCE * (noisy - clean)
    first, last = np.log(table.sigmas[[0, -1]])
    if max(abs(first - clean), abs(last - noisy)) <= slack:
        return
    alphas_T = levels_T[1:] / levels_T[:-1]
    hint = "Use the scheduler that the table was measured with, or measure a new table."
    if table.alpha_bars.min() >= alphas_T.min() - LABEL_TOLERANCE and last < noisy - slack:
        hint = (
            f"All its alpha_bars lie where the scheduler's alpha_t = 1 - beta_t do ({alphas_T.min():.6f} and above): "
            "the column probably holds alpha_t.\n  alpha_bar is the product of all alpha up to t."
        )
    raise VrgError(
        f"{_name(table)} does not fit the scheduler: its sigmas should span {np.exp(clean):.4g} to "
        f"{np.exp(noisy):.4g}, found {np.exp(first):.4g} to {np.exp(last):.4g}.\n  {hint}"
    )


def _name(table: "ErrorTable") -> str:
    source = table.provenance.get("source")
    return f"the error table {source}" if source else "the error table"
