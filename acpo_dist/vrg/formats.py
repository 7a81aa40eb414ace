"""The published text formats: error tables `ts alpha_bar MSE` and trajectories, one alpha_bar per line.

Lines that start with # are comments. Tables run from clean to noisy and end with a safeguard row of zeros. Trajectories
run from clean to noisy too; in the originals the first line is timestep 0, where no step starts, and is dropped.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from acpo_dist.core.errors import VrgError
from acpo_dist.vrg.levels import FloatArray, to_sigmas
from acpo_dist.vrg.table import ErrorTable


def read_table_text(path: Path) -> ErrorTable:
    """An error table; rows that share a printed alpha_bar are merged into their mean.

    Raises:
        VrgError: unreadable, a row that is not three numbers, or values that are no table.
    """
    rows = [_numbers(path, number, text.split(), 3) for number, text in _lines(path)]
    rows = [row for row in rows if row[1] > 0]
    merged: dict[float, list[list[float]]] = {}
    for row in rows:
        merged.setdefault(row[1], []).append(row)
    nodes = np.array([np.mean(same, axis=0) for same in merged.values()]).reshape(-1, 3)
    return ErrorTable(
        sigmas=to_sigmas(nodes[:, 1]), v=nodes[:, 2], timesteps=nodes[:, 0],
        provenance={"file": path.name, "rows": len(rows), "merged": len(rows) - len(nodes)},
    )  # fmt: skip


def read_trajectory_text(path: Path) -> FloatArray:
    """Levels alpha_bar of a trajectory in sampling order, rising, shape (N,), with the bits of the file.

    Reads originals and optimised files.

    An original (one bare number per line, possibly `: timestep` behind it) has one line more than steps: its cleanest
    level is where the last step lands, and is dropped. An optimised file has N lines with further columns.

    Raises:
        VrgError: unreadable, a line that does not begin with a number in (0, 1), or levels that are not monotone.
    """
    lines = _lines(path)
    values = [_numbers(path, number, text.split(":")[0].split(), 1)[0] for number, text in lines]
    if not values or not all(0 < value < 1 for value in values):
        raise VrgError(f"{path}: a trajectory is a list of alpha_bars in (0, 1), one per line; found {values[:3]}.")
    falling = all(a > b for a, b in zip(values, values[1:], strict=False))
    if not falling or len(values) < 2:
        raise VrgError(f"{path}: alpha_bars must fall strictly from clean to noisy, at least two of them.")
    original = not any(";" in text for _, text in lines)
    return np.array(values[1 if original else 0 :])[::-1].copy()


def write_trajectory_text(path: Path, alpha_bars: Sequence[float], comments: Sequence[str]) -> None:
    """An optimised trajectory as a text file: N lines from clean to noisy, full precision.

    Args:
        alpha_bars: in sampling order, rising, without the clean end.
    """
    lines = [*(f"# {comment}" for comment in comments), *(f"{level!r} ;" for level in reversed(list(alpha_bars)))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VrgError(f"{path} cannot be read: {error}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    kept = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not kept:
        raise VrgError(f"{path} holds no rows: expected numbers, found {len(lines)} empty or comment lines.")
    return kept


def _numbers(path: Path, number: int, cells: Sequence[str], count: int) -> list[float]:
    try:
        values = [float(cell) for cell in cells[:count]]
    except ValueError:
        values = []
    if len(values) != count:
        raise VrgError(f"{path}, line {number}: expected {count} number(s), found {' '.join(cells)!r}.")
    return values
