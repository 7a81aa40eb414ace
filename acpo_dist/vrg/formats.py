"""Read and write the text files of the public VRG release: error tables, trajectories and optimised trajectories.

Each file has `#` comments followed by columns. Rows are ordered from clean to noisy; functions in this module return
levels from noisy to clean. The text formats round values; the JSON artefact of
`acpo_dist.training.trajectory.artefact` stores them exactly.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import FloatArray, to_sigmas
from acpo_dist.vrg.objective import to_alphas
from acpo_dist.vrg.table import ErrorTable, Interpolation

SAFEGUARD_COMMENT = "# the last row is a safeguard."


@dataclass(frozen=True, kw_only=True)
class PublishedTrajectory:
    """A trajectory of N levels from noisy to clean.

    `alpha_bar_end` is the level at t = 0. Files list it first; the objective does not use it.
    """

    alpha_bars: tuple[float, ...]
    alpha_bar_end: float
    order: int = 1
    skip_type: str = "unknown"

    @property
    def sigmas(self) -> FloatArray:
        """Noise-to-signal ratios, decreasing, shape (N,)."""
        return to_sigmas(self.alpha_bars)


def read_error_table(path: str | Path, *, interpolation: Interpolation = "log_cubic") -> ErrorTable:
    """Read an error table with rows `timestep alpha_bar MSE` in any order.

    Safeguard rows (alpha_bar and MSE are 0) are dropped. Rows with equal alpha_bar (caused by rounding) are merged into
    one row with the mean MSE and the timestep of the first row; `provenance["merged_rows"]` is the number of rows
    removed by merging.

    Args:
        path: the text file.
        interpolation: interpolation of the returned table.

    Returns:
        The error table.

    Raises:
        VrgError: the file cannot be read, or a row is not three numbers.
    """
    rows: dict[float, list[tuple[float, float]]] = {}
    total = 0
    comments, lines = _read_lines(path)
    for number, line in lines:
        timestep, alpha_bar, error = _numbers(path, number, line.split(), 3)
        if alpha_bar == 0 and error == 0:
            continue
        if not 0 < alpha_bar < 1:
            raise VrgError(f"{path}, line {number}: alpha_bar must lie in (0, 1), found {alpha_bar:g}.")
        rows.setdefault(alpha_bar, []).append((timestep, error))
        total += 1
    return ErrorTable(
        sigmas=to_sigmas(list(rows)),
        v=np.array([float(np.mean([error for _, error in group])) for group in rows.values()]),
        timesteps=np.array([group[0][0] for group in rows.values()]),
        provenance={"source": str(path), "comments": comments, "merged_rows": total - len(rows)},
        interpolation=interpolation,
    )


def write_error_table(path: str | Path, table: ErrorTable, *, comments: Iterable[str] = ()) -> None:
    """Write an error table: integer timesteps, alpha_bar with six decimals, MSE with eight, and a safeguard row.

    Args:
        path: the text file.
        table: a table with integer timesteps.
        comments: comment lines without `#`.

    Raises:
        VrgError: the table has no timesteps, or a timestep is not an integer.
    """
    if table.timesteps is None or (table.timesteps != np.rint(table.timesteps)).any():
        raise VrgError(
            "the published table format needs an integer timestep per node; write the JSON artefact instead."
        )
    rows = [
        f"{int(timestep):4d}\t{alpha_bar:.6f}\t{error:.8f}"
        for timestep, alpha_bar, error in zip(table.timesteps, table.alpha_bars, table.v, strict=True)
    ]
    safeguard = f"{int(table.timesteps.max()) + 1:4d}\t{0:.6f}\t{0:.8f}"
    _write(path, [*_commented(comments), "# ts  \talpha_bar\tMSE", *rows, safeguard, SAFEGUARD_COMMENT])


def read_trajectory(path: str | Path) -> PublishedTrajectory:
    """Read a trajectory file: one alpha_bar per line, from t = 0 to the noisy end.

    A second column (`: timestep`) is ignored.

    Args:
        path: the text file.

    Returns:
        The trajectory.

    Raises:
        VrgError: the file cannot be read, its `data_type` is not alpha_bar, the levels do not decrease, or the number
            of levels does not match the `steps` comment.
    """
    comments, levels = _read_levels(path)
    header = {key.strip(): value.strip() for key, _, value in (comment.partition(":") for comment in comments)}
    if header.get("data_type", "alpha_bar") != "alpha_bar":
        raise VrgError(f"{path} should hold data_type alpha_bar, found {header['data_type']}.")
    try:
        steps, order = int(header.get("steps", len(levels) - 1)), int(header.get("order", 1))
    except ValueError as error:
        raise VrgError(f"{path}: `steps` and `order` must be whole numbers: {error}.") from None
    if len(levels) < 2 or len(levels) != steps + 1:
        raise VrgError(
            f"{path} names {steps} steps and should hold {steps + 1} levels, the first at t = 0; found {len(levels)}."
        )
    return PublishedTrajectory(
        alpha_bars=tuple(levels[:0:-1]),
        alpha_bar_end=levels[0],
        order=order,
        skip_type=header.get("skip_type", "unknown"),
    )


def write_trajectory(path: str | Path, trajectory: PublishedTrajectory) -> None:
    """Write a trajectory file with eight decimals, the level at t = 0 first."""
    header = {
        "order     ": trajectory.order,
        "steps     ": len(trajectory.alpha_bars),
        "skip_type ": trajectory.skip_type,
        "data_type ": "alpha_bar",
    }
    levels = [trajectory.alpha_bar_end, *reversed(trajectory.alpha_bars)]
    _write(path, [*(f"# {key}: {value}" for key, value in header.items()), *(f"{level:.8f}" for level in levels)])


def read_result(path: str | Path) -> tuple[float, ...]:
    """Read an optimised trajectory: the first column of N rows. The file has no row for t = 0.

    Args:
        path: the text file.

    Returns:
        N alpha_bars from noisy to clean.

    Raises:
        VrgError: the file cannot be read, has no rows, or the levels do not decrease.
    """
    _, levels = _read_levels(path)
    return tuple(reversed(levels))


def write_result(
    path: str | Path, alpha_bars_N: Sequence[float], table: ErrorTable, *, comments: Iterable[str] = ()
) -> None:
    """Write an optimised trajectory: `alpha_bar : row: alpha; coef*weight=numerator; numerator/alpha_bar=sub_var`.

    `row` is the index (from the clean end) of the last table row whose sigma does not exceed the level's sigma;
    `sub_var` is the contribution of the step to J.

    Args:
        path: the text file.
        alpha_bars_N: N levels from noisy to clean.
        table: the error table of J.
        comments: comment lines without `#`.
    """
    levels = np.asarray(alpha_bars_N, dtype=np.float64)
    alphas, values = to_alphas(levels), table.value(to_sigmas(levels))
    coefficients = (np.sqrt(1 - levels) - np.sqrt(alphas - levels)) ** 2
    rows_below = np.searchsorted(table.sigmas, to_sigmas(levels), side="right") - 1
    rows = [
        f"{level:.8f} : {max(row, 0):4d}: {alpha:.6f}; {coefficient:.6f}*{value:.6f}={coefficient * value:.6f}; "
        f"{coefficient * value:.6f}/{level:.6f}={coefficient * value / level:.6f}"
        for level, row, alpha, coefficient, value in zip(levels, rows_below, alphas, coefficients, values, strict=True)
    ]
    legend = "# alpha_bar : row: alpha; coef*weight=numerator; numerator/alpha_bar=sub_var"
    _write(path, [*_commented(comments), legend, *reversed(rows)])


def _read_lines(path: str | Path) -> tuple[list[str], list[tuple[int, str]]]:
    """Comments without `#`, and the remaining lines with their line numbers."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VrgError(f"cannot read {path}: {error}.") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    comments = [line.lstrip("#").strip() for _, line in lines if line.startswith("#")]
    return comments, [(number, line) for number, line in lines if not line.startswith("#")]


def _read_levels(path: str | Path) -> tuple[list[str], list[float]]:
    comments, lines = _read_lines(path)
    levels = [_numbers(path, number, line.split(":")[:1], 1)[0] for number, line in lines]
    if not levels:
        raise VrgError(f"{path} holds no levels.")
    if not (levels[0] < 1 and levels[-1] > 0 and all(later < earlier for earlier, later in pairwise(levels))):
        raise VrgError(f"{path}: alpha_bars must lie in (0, 1) and decrease from clean to noisy.")
    return comments, levels


def _numbers(path: str | Path, number: int, fields: Sequence[str], count: int) -> list[float]:
    try:
        values = [float(field) for field in fields[:count]]
    except ValueError:
        values = []
    if len(values) != count or not np.isfinite(values).all():
        raise VrgError(f"{path}, line {number}: expected {count} finite number(s), found {' '.join(fields)!r}.")
    return values


def _commented(comments: Iterable[str]) -> list[str]:
    return [f"# {comment}" for comment in comments]


def _write(path: str | Path, lines: Iterable[str]) -> None:
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
