"""Does an error table belong to a scheduler? Legend: K nodes, T training timesteps."""

from typing import TYPE_CHECKING

import numpy as np

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import FloatArray, to_alpha_bars, to_sigmas

if TYPE_CHECKING:
    from acpo_dist.vrg.table import ErrorTable

LEVEL_TOLERANCE = 0.02
"""In log sigma per node. Six printed decimals of alpha_bar are off by up to 0.006 at alpha_bar = 4e-5."""
RANGE_TOLERANCE = 0.1
"""Share of the scheduler's range of log sigma that nodes may leave out, or exceed, at either end."""
LABEL_TOLERANCE = 2e-6
"""In alpha; published columns carry six decimals."""


def check_fit(table: "ErrorTable", levels_T: FloatArray) -> None:
    """Refuse a table whose nodes are not levels of the schedule.

    Where the table names timesteps, node by node; they may count from 0 or from 1. Always by range of sigma.

    Raises:
        VrgError: says what was expected, what was found and what to do.
    """
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
