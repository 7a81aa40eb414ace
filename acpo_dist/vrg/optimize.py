"""Move the nodes of a sampling trajectory to where less prediction error gathers (Variance-Reduction Guidance).

Legend: N denoise steps from noisy to clean. See `acpo_dist.vrg.objective` for J. A free minimum of J is a poor
sampler, so both modes stay near the given trajectory:
  * `log_trust`: log sigma of each node moves by at most `trust` times the gap to the neighbour it moves towards; the
    noisy end stays where the starting noise is.
  * `paper_box`: the box and the loss of the publication, for parity. It lets the noisy end drift.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import FloatArray, checked_sigmas, to_alpha_bars
from acpo_dist.vrg.log_trust import log_gaps, search_log_trust
from acpo_dist.vrg.objective import cumulative_error
from acpo_dist.vrg.paper_box import search_paper_box
from acpo_dist.vrg.responses import Response, Solver, as_solver
from acpo_dist.vrg.table import ErrorTable

Mode = Literal["log_trust", "paper_box"]

FLOAT32_SLACK = 1e-6
"""Relative; a cleanest node that went through float32 may stand this far below sigma_min."""


@dataclass(frozen=True, kw_only=True)
class OptimisedTrajectory:
    """N nodes in sampling order (noisy to clean) and how they came about."""

    sigmas: tuple[float, ...]
    alpha_bars: tuple[float, ...]
    """1 / (1 + sigma^2)."""
    j0: float
    """J of the given trajectory, under the same table, interpolation and solver as j1."""
    j1: float
    """J of this one, without the penalty of `paper_box`; never above j0."""
    cpu_seconds: float
    saturation: float
    """Largest move of a node in log sigma over the gap to the neighbour it neared; `log_trust` allows `trust`."""
    table_hash: str
    mode: str
    settings: Mapping[str, Any]
    """Arguments of `optimize` that this mode used, as JSON values."""

    @property
    def gain(self) -> float:
        """1 - j1 / j0, in [0, 1)."""
        return 1 - self.j1 / self.j0


def optimize(
    sigmas: ArrayLike,
    table: ErrorTable,
    *,
    mode: Mode = "log_trust",
    trust: float = 0.25,
    lp: float = 0.01,
    reg_lambda: float = 100.0,
    sigma_min: float | None = None,
    sigma_end: float = 0.0,
    solver: str | Solver | Response = "first_order",
) -> OptimisedTrajectory:
    """The trajectory with the least J near the given one; a pure function of its arguments.

    The search is global on a grid for the first-order objective and is finished by a gradient method on the solver's
    own. With other solvers the global part is a start, so their optimum is a local one.

    Args:
        sigmas: N nodes, rising or falling; the result falls.
        trust: `log_trust`: in [0, 0.5), which keeps the order. The cleanest node, which has no cleaner neighbour when
            sigma_end is 0, takes its other gap for both directions.
        lp: `paper_box`: largest change of alpha_i, the ratio of neighbouring alpha_bars.
        reg_lambda: `paper_box`: weight of the squared change of the noisiest alpha_bar.
        sigma_min: no node goes below; the scheduler's sigma at timestep 0. None: no limit, as in the publication.
        sigma_end: where the last step lands. `paper_box` knows the clean end (0) only.
        solver: a name in `responses.SOLVERS`, a `Solver`, or a response function.

    Returns:
        Strictly falling sigmas. `log_trust`: the first has the very bits it came with. `paper_box` reads the table with
        `linear_alpha_bar`, as the publication does.

    Raises:
        VrgError: an unknown mode, arguments out of range, or sigmas that are no trajectory.
    """
    began = time.process_time()
    start = checked_sigmas(sigmas, sigma_end)
    solver = as_solver(solver)
    lowest = _checked_floor(start, sigma_min)
    settings: dict[str, Any] = {"solver": solver.name, "sigma_min": sigma_min, "sigma_end": sigma_end}
    if mode == "log_trust":
        if not 0 <= trust < 0.5:
            raise VrgError(f"trust must be in [0, 0.5), found {trust}: from 0.5 on neighbours could change places.")
        settings["trust"] = trust
        found = search_log_trust(start, table, trust=trust, lowest=lowest, sigma_end=sigma_end, solver=solver)
    elif mode == "paper_box":
        if not (0 < lp < 1 and reg_lambda >= 0 and sigma_end == 0):
            raise VrgError(
                "paper_box needs 0 < lp < 1, reg_lambda >= 0 and sigma_end = 0, "
                f"found lp {lp}, reg_lambda {reg_lambda}, sigma_end {sigma_end}."
            )
        settings |= {"lp": lp, "reg_lambda": reg_lambda}
        table = table.with_interpolation("linear_alpha_bar")
        found = search_paper_box(start, table, lp=lp, reg_lambda=reg_lambda, lowest=lowest, solver=solver)
    else:
        raise VrgError(f"unknown mode {mode!r}; known: log_trust, paper_box.")
    settings["interpolation"] = table.interpolation
    return OptimisedTrajectory(
        sigmas=tuple(found.tolist()),
        alpha_bars=tuple(to_alpha_bars(found).tolist()),
        j0=cumulative_error(start, table, sigma_end=sigma_end, solver=solver),
        j1=cumulative_error(found, table, sigma_end=sigma_end, solver=solver),
        cpu_seconds=time.process_time() - began,
        saturation=_saturation(start, found, sigma_end),
        table_hash=table.hash,
        mode=mode,
        settings=settings,
    )


def _checked_floor(start: FloatArray, sigma_min: float | None) -> float:
    """The least sigma a node may take; 0 is no limit."""
    if sigma_min is None:
        return 0.0
    if not (sigma_min > 0 and start[-1] >= sigma_min * (1 - FLOAT32_SLACK)):
        raise VrgError(
            f"the cleanest sigma must be at least sigma_min > 0, found {start[-1]:.8g} and {sigma_min:.8g}.\n"
            "  Start from a trajectory inside the scheduler's range."
        )
    return min(sigma_min, float(start[-1]))


def _saturation(start: FloatArray, found: FloatArray, sigma_end: float) -> float:
    if len(start) == 1:
        return abs(float(np.log(found[0] / start[0])))  # no neighbour: the plain move
    moves = np.log(found / start)
    noisier, cleaner = log_gaps(start, sigma_end)
    return float((np.abs(moves) / np.where(moves > 0, noisier, cleaner)).max())
