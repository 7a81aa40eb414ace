"""Offline preference pairs in Pick-a-Pic's layout: parquet rows with jpg_0, jpg_1, label_0 and caption.

The sample ids of a row are `pair:<row>:w` for its winner and `pair:<row>:l` for its loser. The rows of an iteration
depend only on seed and iteration, so a resumed run uses the same rows and ranks store no position.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from acpo_dist.core.errors import DataError, shorten
from acpo_dist.core.seeding import generator
from acpo_dist.core.sizes import Size
from acpo_dist.data.decoding import decode_fitted
from acpo_dist.data.parquet_images import require_honest

IMAGES = ("jpg_0", "jpg_1")
LABEL, CAPTION = "label_0", "caption"
UIDS = ("image_0_uid", "image_1_uid")
_PREFIX = "pair"


@dataclass(frozen=True, kw_only=True)
class PairIndex:
    """Usable rows, and counts of excluded rows by reason."""

    rows: tuple[tuple[int, ...], ...]
    """Usable rows by row group, numbered over all files."""
    counts: Mapping[str, int]
    """`rows`, `usable`, and by reason: `tie`, `unlabelled`, `no_caption`, `not_absolute`."""
    _orders: dict[tuple[int, int], list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def sample_pairs(self, *, iteration: int, count: int, run_seed: int) -> list[str]:
        """Return the sample ids of one iteration.

        Row groups are shuffled, and rows within them, so that a pass over the data reads each row group once.

        Args:
            iteration: number of the iteration.
            count: number of pairs.
            run_seed: seed of the run.

        Returns:
            2 * count ids; each winner is followed by its loser.
        """
        total = sum(map(len, self.rows))
        start = iteration * count
        ids: list[str] = []
        for position in range(start, start + count):
            epoch, place = divmod(position, total)
            row = self._order(epoch, run_seed)[place]
            ids += [f"{_PREFIX}:{row}:w", f"{_PREFIX}:{row}:l"]
        return ids

    def _order(self, epoch: int, run_seed: int) -> list[int]:
        """Return the order of all usable rows in one pass; the orders of the last two passes are cached."""
        if (epoch, run_seed) not in self._orders:
            draw = generator("pairs", run_seed, epoch)
            order: list[int] = []
            for group in torch.randperm(len(self.rows), generator=draw).tolist():
                rows = self.rows[group]
                order += [rows[place] for place in torch.randperm(len(rows), generator=draw).tolist()]
            while len(self._orders) >= 2:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch, run_seed] = order
        return self._orders[epoch, run_seed]


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Images of several pairs."""

    pixels: Tensor = field(repr=False)
    """Float32 RGB in [0, 1], (B, 3, H, W); zeros for a broken image."""
    prompts: tuple[str, ...]
    whole_B: Tensor
    """1, or 0 for both samples of a pair if one of its images cannot be decoded."""
    broken: list[str]
    """Ids whose image cannot be decoded."""


class PairSet:
    """Reads rows on demand and caches the last two row groups."""

    def __init__(self, path: Path, size: int | Size) -> None:
        """Open the files.

        Args:
            path: a parquet file, or a folder of them (read in sorted order).
            size: (width, height), or the side of a square, to which images are cropped and resized.

        Raises:
            DataError: a file is missing or unreadable, or lacks a column.
        """
        self._files = _open_files(path)
        self._size = size
        self._groups = [
            (file, group, file.file.metadata.row_group(group).num_rows)
            for file in self._files
            for group in range(file.file.metadata.num_row_groups)
        ]
        self._starts = [0]
        for _, _, count in self._groups:
            self._starts.append(self._starts[-1] + count)
        self._held: dict[int, dict[str, list[Any]]] = {}

    def index(self, *, absolute: bool = False) -> PairIndex:
        """Read labels and captions of every row, but no images.

        Args:
            absolute: whether to keep only pairs whose winner never lost or tied in the whole set.

        Returns:
            The usable rows.

        Raises:
            DataError: a label is not 0, 0.5 or 1, or no row is usable.
        """
        columns = [LABEL, CAPTION, *(UIDS if absolute else ())]
        for file in self._files:
            file.require(columns)
        labelled = [
            (group, self._starts[group] + place, row)
            for group, (file, number, _) in enumerate(self._groups)
            for place, row in enumerate(file.read(number, columns).to_pylist())
        ]
        beaten = {uid for _, _, row in labelled for uid in _not_winning(row)} if absolute else set[str]()
        counts: Counter[str] = Counter(rows=len(labelled))
        kept: dict[int, list[int]] = {}
        for group, number, row in labelled:
            reason = _reason(row, beaten, f"{self._groups[group][0].path}, row {number}")
            counts[reason or "usable"] += 1
            if reason is None:
                kept.setdefault(group, []).append(number)
        if not kept:
            found = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise DataError(f"data.pairs: no pair can be used ({found}). A pair needs a caption and a label 0 or 1.")
        return PairIndex(rows=tuple(map(tuple, kept.values())), counts=dict(counts))

    def read(self, ids: Sequence[str]) -> PairBatch:
        """Decode the images of the given sample ids."""
        pixels, prompts, broken_rows, broken = [], [], set[int](), []
        rows = [parse_pair_id(sample_id) for sample_id in ids]
        for sample_id, (row, is_winner) in zip(ids, rows, strict=True):
            cells = self._row(row)
            first_wins = float(cells[LABEL]) == 1.0
            encoded = cells[IMAGES[0 if first_wins == is_winner else 1]]
            try:
                image = decode_fitted(encoded["bytes"] if isinstance(encoded, dict) else encoded, self._size)
            except DataError:
                width, height = (self._size, self._size) if isinstance(self._size, int) else self._size
                image = torch.zeros(3, height, width)
                broken_rows.add(row)
                broken.append(sample_id)
            pixels.append(image)
            prompts.append(str(cells[CAPTION]))
        whole = torch.tensor([0.0 if row in broken_rows else 1.0 for row, _ in rows])
        return PairBatch(pixels=torch.stack(pixels), prompts=tuple(prompts), whole_B=whole, broken=broken)

    def _row(self, row: int) -> dict[str, Any]:
        group = next(index for index, start in enumerate(self._starts[1:]) if row < start)
        if group not in self._held:
            # Two are enough: an iteration crosses at most one boundary, unless row groups are tiny.
            while len(self._held) >= 2:
                self._held.pop(next(iter(self._held)))
            file, number, _ = self._groups[group]
            table = file.read(number, [*IMAGES, LABEL, CAPTION])
            self._held[group] = {name: table.column(name).to_pylist() for name in table.column_names}
        place = row - self._starts[group]
        return {name: values[place] for name, values in self._held[group].items()}


def is_pair_id(sample_id: str) -> bool:
    """Return whether a sample is an image of a pair, as opposed to a rollout."""
    return sample_id.startswith(f"{_PREFIX}:")


def parse_pair_id(sample_id: str) -> tuple[int, bool]:
    """Return (row, whether the sample is the winner)."""
    _, row, side = sample_id.split(":")
    return int(row), side == "w"


def _reason(row: Mapping[str, Any], beaten: set[str], where: str) -> str | None:
    """Return why a row is excluded, or None."""
    label = row[LABEL]
    if label is None or label != label:
        return "unlabelled"
    if label not in (0, 0.5, 1):
        raise DataError(f"{where}: {LABEL} is {label!r}; expected 1 (jpg_0 wins), 0 (jpg_1 wins) or 0.5 (tie).")
    if label == 0.5:
        return "tie"
    if not row[CAPTION] or not str(row[CAPTION]).strip():
        return "no_caption"
    if beaten and row[UIDS[0 if label == 1 else 1]] in beaten:
        return "not_absolute"
    return None


def _not_winning(row: Mapping[str, Any]) -> list[str]:
    """Return the uids that lost or tied in this row."""
    first, second = (row[name] for name in UIDS)
    label = row[LABEL]
    if label is None or label != label:
        return []
    return [first, second] if label == 0.5 else [second if label == 1 else first]


@dataclass(frozen=True)
class _PairFile:
    path: Path
    file: pq.ParquetFile

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        try:
            return self.file.read_row_group(group, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path} is damaged: {shorten(str(error))}") from error

    def require(self, columns: Sequence[str]) -> None:
        """Check that the columns exist and that none unpacks to many times its size."""
        found = self.file.schema_arrow.names
        missing = [name for name in columns if name not in found]
        if missing:
            raise DataError(
                f"{self.path}: no column {', '.join(f'`{name}`' for name in missing)}. Columns found: "
                f"{', '.join(found)}. `acpo pairs` makes such a file from scored images."
            )
        for name in columns:
            require_honest(self.file, self.path, name)


def _open_files(path: Path) -> list[_PairFile]:
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths or not all(entry.is_file() for entry in paths):
        raise DataError(f"data.pairs: expected a parquet file, or a folder of them, at {path}; found none.")
    files = []
    for entry in paths:
        try:
            file = _PairFile(entry, pq.ParquetFile(entry))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{entry} is not a readable parquet file: {shorten(str(error))}") from error
        file.require([*IMAGES, LABEL, CAPTION])
        files.append(file)
    return files
