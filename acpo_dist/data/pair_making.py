"""Build a file of preference pairs, as read by `data.pairs`, from scored images."""

import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from acpo_dist.core.errors import DataError
from acpo_dist.data.decoding import require_image
from acpo_dist.data.images import read_images
from acpo_dist.data.pairs import CAPTION, IMAGES, LABEL, UIDS
from acpo_dist.data.tables import read_table
from acpo_dist.objective.pairs import Verdict, nearly_same, pair_group

_ROW_GROUP = 256


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """One row of a table of scores."""

    path: Path
    prompt: str
    scores: Mapping[str, float]
    """Score by column; NaN if missing."""


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """Two rows of one prompt."""

    winner: ScoredImage
    loser: ScoredImage


def read_scores(table: Path, folder: Path, columns: Sequence[str], prompt_column: str) -> list[ScoredImage]:
    """Read a CSV file with the columns `path`, a prompt, and scores.

    Args:
        table: CSV file.
        folder: folder that relative image paths refer to.
        columns: score columns; if empty, all named columns with numeric values.
        prompt_column: column with the prompt.

    Returns:
        One image per row; a score is NaN if its cell is empty.

    Raises:
        DataError: the file or a column is missing, there is no row, or a line has more cells than the header, no path,
            or a score that is no number.
    """
    header, rows = _read_table(table)
    for name in ("path", prompt_column, *columns):
        if name not in header:
            raise DataError(f"{table}: no column `{name}`. Columns found: {', '.join(header)}.")
    columns = list(dict.fromkeys(columns)) or [
        # pandas writes its index as a column without a name.
        name for name in header if name not in ("", "path", prompt_column) and _is_score(name, rows)
    ]  # fmt: skip
    if not columns:
        raise DataError(f"{table}: no column of scores. Columns found: {', '.join(header)}.")
    images = []
    for line, row in rows:
        for name in columns:
            if row[name] and not _number(row[name]):
                raise DataError(
                    f"{table}, line {line}: `{name}` is {row[name]!r}, expected a number. Repair it, or name the "
                    "columns that are scores with --score."
                )
        if not row["path"]:
            raise DataError(f"{table}, line {line}: no path. Every row needs the image that its scores belong to.")
        scores = {name: float(row[name] or "nan") for name in columns}
        images.append(ScoredImage(path=folder / row["path"], prompt=row[prompt_column].strip(), scores=scores))
    return images


def pair_up(
    images: Sequence[ScoredImage], *, lower_is_better: Sequence[str] = (), margin: float = 0.0,
    absolute: bool = True, duplicates: float = 0.0,
) -> tuple[list[ImagePair], dict[str, int]]:  # fmt: skip
    """Pair the best image of each prompt with the worst, the second best with the second worst, and so on.

    Each score is first standardised over the whole table to mean 0 and standard deviation 1; scores have equal weight.

    Args:
        images: scored images.
        lower_is_better: score columns whose sign is flipped.
        margin: minimum difference of the summed standardised scores.
        absolute: whether to drop pairs in which any score prefers the loser.
        duplicates: threshold for dropping pairs of nearly equal images (see `nearly_same`); 0 disables it.

    Returns:
        (pairs; counts by outcome: `images`, `no_prompt`, `no_score` (a score is missing), `odd`, and the values of
        `Verdict`).

    Raises:
        DataError: a score column is constant, or `lower_is_better` names a missing column.
    """
    names = list(images[0].scores)
    for name in lower_is_better:
        if name not in names:
            raise DataError(f"--lower {name}: no such score; found {', '.join(names)}.")
    qualities = {name: _standardised(images, name, -1 if name in lower_is_better else 1) for name in names}
    counts: Counter[str] = Counter(images=len(images))
    # Indexed by row, because one image may occur for several prompts, with separate scores.
    by_prompt: dict[str, list[str]] = {}
    for row, image in enumerate(images):
        if not image.prompt:
            counts["no_prompt"] += 1
        elif not all(math.isfinite(score) for score in image.scores.values()):
            counts["no_score"] += 1
        else:
            by_prompt.setdefault(image.prompt, []).append(str(row))
    kept: list[ImagePair] = []
    for rows in by_prompt.values():
        if len(rows) % 2:
            # With an odd number of images, the middle one has no partner.
            middle = sorted(rows, key=lambda row: sum(scores[row] for scores in qualities.values()))[len(rows) // 2]
            rows = [row for row in rows if row != middle]
            counts["odd"] += 1
        found = pair_group(
            rows, qualities, dict.fromkeys(names, 1.0 / len(names)), margin=margin, absolute=absolute,
            duplicate=lambda a, b: _same(images[int(a)].path, images[int(b)].path, duplicates),
        )  # fmt: skip
        counts.update(pair.verdict.value for pair in found)
        kept += [
            ImagePair(winner=images[int(pair.winner)], loser=images[int(pair.loser)])
            for pair in found
            if pair.verdict is Verdict.KEPT
        ]
    return kept, dict(counts)


def write_pairs(path: Path, pairs: Sequence[ImagePair]) -> None:
    """Write a parquet file with the original encoded images; the winner is jpg_0.

    Args:
        path: file to write.
        pairs: pairs.

    Raises:
        DataError: an image is missing or is no image; nothing is written.
    """
    for each in (image.path for pair in pairs for image in (pair.winner, pair.loser)):
        if not each.is_file():
            raise DataError(f"no such image: {each}. Relative paths are relative to the table, or to --folder.")
        # A table that others wrote must not carry the content of any file into data that is passed on.
        require_image(each)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [*((name, pa.binary()) for name in IMAGES), (LABEL, pa.float64()), (CAPTION, pa.string()),
         *((name, pa.string()) for name in UIDS)]
    )  # fmt: skip
    with pq.ParquetWriter(path, schema) as writer:
        for part in _parts(pairs):
            rows = [
                {
                    IMAGES[0]: _bytes(pair.winner.path), IMAGES[1]: _bytes(pair.loser.path), LABEL: 1.0,
                    CAPTION: pair.winner.prompt, UIDS[0]: str(pair.winner.path), UIDS[1]: str(pair.loser.path),
                }
                for pair in part
            ]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _read_table(table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return (header, rows with their first line numbers); missing cells of a short row are empty."""
    if not table.is_file():
        found = "a folder" if table.is_dir() else "nothing"
        raise DataError(
            f"expected a CSV file at {table}, found {found}. `acpo score FOLDER --csv FILE` writes one; add a "
            "prompt column."
        )
    found = read_table(table)
    header = _header(table, found.header)
    rows = [(row.line, dict(zip(header, row.cells, strict=True))) for row in found.rows]
    if not rows:
        raise DataError(f"{table} holds no row below its header.")
    return header, rows


def _header(table: Path, cells: Sequence[str]) -> list[str]:
    names = [name.strip() for name in cells]
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        raise DataError(f"{table}: column `{twice[0]}` exists twice; rename one of them.")
    return names


def _is_score(name: str, rows: Sequence[tuple[int, Mapping[str, str]]]) -> bool:
    """Return whether a column has a numeric value; other values in it raise an error later, with their line."""
    return any(_number(row[name]) for _, row in rows)


def _parts(pairs: Sequence[ImagePair]) -> list[Sequence[ImagePair]]:
    return [pairs[start : start + _ROW_GROUP] for start in range(0, len(pairs), _ROW_GROUP)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _standardised(images: Sequence[ScoredImage], name: str, sign: int) -> dict[str, float]:
    """Return the standardised score by row; NaN if missing."""
    values = [image.scores[name] for image in images]
    finite = [value for value in values if math.isfinite(value)]
    spread = statistics.pstdev(finite) if len(finite) > 1 else 0.0
    if spread == 0:
        raise DataError(f"score `{name}` is the same for all images, so it ranks none. Leave it out.")
    mean = statistics.fmean(finite)
    return {str(row): sign * (value - mean) / spread for row, value in enumerate(values)}


def _same(first: Path, second: Path, threshold: float) -> bool:
    if os.path.abspath(first) == os.path.abspath(second):
        return True
    if threshold <= 0:
        return False
    one, other = (next(read_images([path]))[1] for path in (first, second))
    return nearly_same(one, other, threshold)


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
