"""Images with opinion scores in CSV files, rescaled, and split so that no reference is on both sides."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from acpo_dist.core.errors import DataError
from acpo_dist.data.tables import read_table

_LEAST_REFERENCES = 10


def csv_rows(path: Path, wanted: Sequence[str], most: int | None = None) -> list[dict[str, str]]:
    """Read rows of a CSV file.

    Args:
        path: CSV file.
        wanted: required columns.
        most: maximum number of rows; None reads all.

    Returns:
        Rows by column name.

    Raises:
        DataError: the file cannot be read, has no row, or lacks a required column.
    """
    table = read_table(path)
    if not set(wanted) <= set(table.header):
        raise DataError(
            f"{path} needs the columns {' and '.join(f'`{name}`' for name in wanted)} in its first line, found "
            f"{', '.join(table.header)}."
        )
    rows = list(table.records())[:most]
    if not rows:
        raise DataError(f"{path} has no row below its first line.")
    return rows


def opinions(rows: Sequence[dict[str, str]], path: Path, *, lower_is_better: bool = False) -> list[float]:
    """Rescale the column `mos` linearly so that its minimum and maximum become 0 and 1; higher is better.

    Args:
        rows: rows of the file.
        path: CSV file, for messages.
        lower_is_better: whether to flip the scale.

    Returns:
        Labels in [0, 1], one per row.

    Raises:
        DataError: a score is no number, or all scores are equal.
    """
    scores = [_number(row["mos"], f"{path}, line {line}") for line, row in enumerate(rows, 2)]
    low, high = min(scores), max(scores)
    if low == high:
        raise DataError(f"{path}: all {len(rows)} scores are {low:g}, so nothing can be ranked.")
    labels = [(score - low) / (high - low) for score in scores]
    return [1 - label for label in labels] if lower_is_better else labels


def split_by_reference(references: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows by reference.

    Args:
        references: reference of each row.
        share: share of the references that is held out; at least two references are.
        seed: seed of the split.

    Returns:
        (training rows, held-out rows).

    Raises:
        DataError: fewer than ten references.
    """
    names = sorted(set(references))
    if len(names) < _LEAST_REFERENCES:
        raise DataError(f"found {len(names)} references; a split by reference needs at least {_LEAST_REFERENCES}.")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    apart = {names[index] for index in order[: min(len(names) - 2, max(2, round(share * len(names))))]}
    rows = range(len(references))
    return [row for row in rows if references[row] not in apart], [row for row in rows if references[row] in apart]


def _number(text: str | None, where: str) -> float:
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: expected a number in the column `mos`, found {text!r}.")
    return number
