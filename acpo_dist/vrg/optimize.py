"""Optimise the noise levels of a sampling trajectory (Variance-Reduction Guidance).

N denoise steps from noisy to clean; J is defined in `acpo_dist.vrg.objective`. The unconstrained minimum of J is a poor
trajectory, so two modes limit the distance from the given trajectory:
  * `log_trust`: log sigma of each node moves by at most `trust` times the gap to the neighbour in the direction of the
    move. The noisy end is fixed.
  * `paper_box`: the constraints and the loss of the publication, for comparison. The noisy end can move.
The third does not minimise J:
  * `hso_grid`: `acpo_dist.vrg.hso_grid`, from the noise schedule, the noisy end and the number of steps alone.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.hso_grid import search_hso_grid
from acpo_dist.vrg.levels import FloatArray, checked_schedule, checked_sigmas, to_alpha_bars
from acpo_dist.vrg.log_trust import log_gaps, search_log_trust
from acpo_dist.vrg.objective import cumulative_error
from acpo_dist.vrg.paper_box import search_paper_box
from acpo_dist.vrg.responses import Response, Solver, as_solver
from acpo_dist.vrg.table import ErrorTable

Mode = Literal["log_trust", "paper_box", "hso_grid"]

FLOAT32_SLACK = 1e-6
"""Relative tolerance below `sigma_min` for a cleanest node that was rounded to float32."""


@dataclass(frozen=True, kw_only=True)
class OptimisedTrajectory:
    """An optimised trajectory of N nodes in sampling order (noisy to clean), with the settings of the optimisation."""

    sigmas: tuple[float, ...]
    alpha_bars: tuple[float, ...]
    """1 / (1 + sigma^2)."""
    j0: float
    """J of the given trajectory, under the same table, interpolation and solver as j1."""
    j1: float
    """J of the optimised trajectory, without the penalty of `paper_box`; above j0 at most in `hso_grid`."""
    cpu_seconds: float
    saturation: float
    """Largest move in log sigma, divided by the gap to the neighbour moved towards; at most `trust` in `log_trust`."""
    table_hash: str
    mode: str
    settings: Mapping[str, Any]
    """Arguments of `optimize` that this mode used, as JSON values."""

    @property
    def gain(self) -> float:
        """Relative reduction of J: 1 - j1 / j0, below 1."""
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
    schedule: ArrayLike | None = None,
) -> OptimisedTrajectory:
    """Find the trajectory with the smallest J near the given one. The result depends on the arguments only.

    A global grid search on the first-order objective is followed by a gradient method on the objective of `solver`. The
    result is a local optimum for other solvers than `first_order`.

    A trajectory can start at pure noise (sigma infinite, a flow model). In velocity units its first step weighs
    ((s_1 - s_2) / (1 - s_2))^2 = 1 (s the flow's sigma, s_1 = 1) wherever it ends, so J does not place that end: the
    first finite node is then fixed as well, and j0 and j1 leave the constant out.

    Args:
        sigmas: N nodes, strictly increasing or decreasing.
        table: the error table of J.
        mode: `log_trust`, `paper_box` or `hso_grid`.
        trust: `log_trust`: largest move as a share of the gap to the neighbour, in [0, 0.5). If `sigma_end` is 0, the
            cleanest node has no cleaner neighbour and uses the gap to its noisier neighbour in both directions.
        lp: `paper_box`: largest change of alpha_i, the ratio of neighbouring alpha_bars.
        reg_lambda: `paper_box`: weight of the squared change of the noisiest alpha_bar.
        sigma_min: lower limit of the nodes, usually the scheduler's sigma at timestep 0. None: no limit, as in the
            publication.
        sigma_end: sigma after the last step; must be 0 in `paper_box`.
        solver: a name in `responses.SOLVERS`, a `Solver`, or a response function.
        schedule: `hso_grid`: the model's alpha_bar by timestep, shape (T,).

    Returns:
        The optimised trajectory with strictly decreasing sigmas. The first sigma is unchanged bit for bit, except in
        `paper_box`. `paper_box` interpolates the table with `linear_alpha_bar`, as in the publication.

    Raises:
        VrgError: an unknown mode, an argument out of range, or invalid sigmas.
    """
    began = time.process_time()
    noise, start = _split_pure_noise(sigmas, sigma_end)
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
    elif mode == "hso_grid":
        if noise or schedule is None:
            raise VrgError(
                "hso_grid needs the noise schedule and a finite first sigma, and a flow model starts at pure noise.\n"
                "  Use log_trust (vrg.search=vrg) for it."
            )
        found = search_hso_grid(float(start[0]), len(start), checked_schedule(schedule))
    else:
        raise VrgError(f"unknown mode {mode!r}; known: log_trust, paper_box, hso_grid.")
    settings["interpolation"] = table.interpolation
    return OptimisedTrajectory(
        sigmas=(*noise, *found.tolist()),
        alpha_bars=tuple(to_alpha_bars([*noise, *found]).tolist()),
        j0=cumulative_error(start, table, sigma_end=sigma_end, solver=solver),
        j1=cumulative_error(found, table, sigma_end=sigma_end, solver=solver),
        cpu_seconds=time.process_time() - began,
        saturation=_saturation(start, found, sigma_end),
        table_hash=table.hash,
        mode=mode,
        settings=settings,
    )


def _split_pure_noise(sigmas: ArrayLike, sigma_end: float) -> tuple[tuple[float, ...], FloatArray]:
    """Return the infinite first node, if there is one, and the finite nodes in sampling order."""
    nodes = np.array(sigmas, dtype=np.float64)
    if nodes.ndim == 1 and len(nodes) > 1 and np.isposinf(nodes[[0, -1]]).any():
        finite = nodes[1:] if np.isposinf(nodes[0]) else nodes[:-1]
        return (float("inf"),), checked_sigmas(finite, sigma_end)
    return (), checked_sigmas(nodes, sigma_end)


def _checked_floor(start: FloatArray, sigma_min: float | None) -> float:
    """Lower limit of sigma; 0 is no limit."""
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
        return abs(float(np.log(found[0] / start[0])))  # a single node has no neighbour: use the move itself
    moves = np.log(found / start)
    noisier, cleaner = log_gaps(start, sigma_end)
    return float((np.abs(moves) / np.where(moves > 0, noisier, cleaner)).max())
