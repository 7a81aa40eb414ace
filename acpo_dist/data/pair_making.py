"""From scored pictures to a file of preference pairs that `data.pairs` reads."""

import csv
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from acpo_dist.core.errors import DataError
from acpo_dist.data.images import read_images
from acpo_dist.data.pairs import CAPTION, LABEL, PICTURES, UIDS
from acpo_dist.objective.pairs import Pair, Verdict, nearly_same, pair_group

_ROW_GROUP = 256


@dataclass(frozen=True, kw_only=True)
class ScoredPicture:
    """One row of a table of scores."""

    path: Path
    prompt: str
    scores: Mapping[str, float]


def read_scores(table: Path, folder: Path, columns: Sequence[str], prompt_column: str) -> list[ScoredPicture]:
    """Rows of a CSV file with the columns `path`, a prompt, and scores.

    Args:
        folder: what relative paths are relative to.
        columns: score columns; empty takes every column whose first value is a number.

    Raises:
        DataError: no such file or column, no row, or a score that is no number; the row is named.
    """
    if not table.is_file():
        raise DataError(
            f"no such file: {table}. `acpo score FOLDER --csv {table.name}` writes one; add a prompt column."
        )
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise DataError(f"{table} holds no row below its header.")
    known = list(rows[0])
    columns = list(columns) or [
        name for name in known if name not in ("path", prompt_column) and _number(rows[0][name])
    ]
    for name in ("path", prompt_column, *columns):
        if name not in known:
            raise DataError(f"{table}: no column `{name}`. Columns found: {', '.join(known)}.")
    if not columns:
        raise DataError(f"{table}: no column of scores. Columns found: {', '.join(known)}.")
    pictures = []
    for number, row in enumerate(rows, start=2):
        scores = {}
        for name in columns:
            value = row[name]
            if value and not _number(value):
                raise DataError(f"{table}, line {number}: `{name}` is {value!r}, expected a number.")
            # A picture without a score is left out of its pairs, and counted there.
            scores[name] = float(value) if value else math.nan
        pictures.append(
            ScoredPicture(path=folder / row["path"], prompt=(row[prompt_column] or "").strip(), scores=scores)
        )
    return pictures


def pair_up(
    pictures: Sequence[ScoredPicture], *, lower_is_better: Sequence[str] = (), margin: float = 0.0,
    absolute: bool = True, duplicates: float = 0.0,
) -> tuple[list[Pair], dict[str, int]]:  # fmt: skip
    """Best with worst of each prompt, second best with second worst, and so on.

    Every score is brought to mean 0 and standard deviation 1 over the whole table first; they count the same.

    Args:
        lower_is_better: score columns whose sign is turned.
        margin: smallest difference of the summed scores, in those units.
        absolute: leave out pairs whose loser some score prefers.
        duplicates: leave out pairs whose pictures are nearly the same (see `nearly_same`); 0 does not look.

    Returns:
        (kept pairs, named by path; what became of everything: `pictures`, `no_prompt`, `odd`, and `Verdict`'s words).

    Raises:
        DataError: a score column without spread, or `lower_is_better` names none.
    """
    names = list(pictures[0].scores)
    for name in lower_is_better:
        if name not in names:
            raise DataError(f"--lower {name}: no such score; found {', '.join(names)}.")
    qualities = {
        name: _standardised(pictures, name, -1 if name in lower_is_better else 1) for name in names
    }  # fmt: skip
    counts: Counter[str] = Counter(pictures=len(pictures))
    by_prompt: dict[str, list[str]] = {}
    for picture in pictures:
        if picture.prompt:
            by_prompt.setdefault(picture.prompt, []).append(str(picture.path))
        else:
            counts["no_prompt"] += 1
    kept: list[Pair] = []
    for paths in by_prompt.values():
        if len(paths) % 2:
            # The middle one has no partner.
            middle = sorted(paths, key=lambda path: sum(scores[path] for scores in qualities.values()))[len(paths) // 2]
            paths = [path for path in paths if path != middle]
            counts["odd"] += 1
        found = pair_group(
            paths, qualities, dict.fromkeys(names, 1.0 / len(names)), margin=margin, absolute=absolute,
            duplicate=(lambda a, b: _same(a, b, duplicates)) if duplicates > 0 else None,
        )  # fmt: skip
        counts.update(pair.verdict.value for pair in found)
        kept += [pair for pair in found if pair.verdict is Verdict.KEPT]
    return kept, dict(counts)


def write_pairs(path: Path, pairs: Sequence[Pair], prompts: Mapping[str, str]) -> None:
    """Write a parquet file with the encoded pictures as they are on disk; the winner is jpg_0.

    Args:
        prompts: prompt by path.

    Raises:
        DataError: a picture is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [*((name, pa.binary()) for name in PICTURES), (LABEL, pa.float64()), (CAPTION, pa.string()),
         *((name, pa.string()) for name in UIDS)]
    )  # fmt: skip
    with pq.ParquetWriter(path, schema) as writer:
        for part in _parts(pairs):
            rows = [
                {
                    PICTURES[0]: _bytes(pair.winner), PICTURES[1]: _bytes(pair.loser), LABEL: 1.0,
                    CAPTION: prompts[pair.winner], UIDS[0]: pair.winner, UIDS[1]: pair.loser,
                }
                for pair in part
            ]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _parts(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    return [pairs[start : start + _ROW_GROUP] for start in range(0, len(pairs), _ROW_GROUP)]


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _standardised(pictures: Sequence[ScoredPicture], name: str, sign: int) -> dict[str, float]:
    values = [picture.scores[name] for picture in pictures]
    finite = [value for value in values if math.isfinite(value)]
    spread = statistics.pstdev(finite) if len(finite) > 1 else 0.0
    if spread == 0:
        raise DataError(f"score `{name}` is the same for all pictures: nothing to prefer by. Leave it out.")
    mean = statistics.fmean(finite)
    return {str(picture.path): sign * (value - mean) / spread for picture, value in zip(pictures, values, strict=True)}


def _same(first: str, second: str, threshold: float) -> bool:
    (_, one), (_, other) = read_images([Path(first), Path(second)])
    return nearly_same(one, other, threshold)


def _number(text: str | None) -> bool:
    try:
        return math.isfinite(float(text or "nan"))
    except ValueError:
        return False
