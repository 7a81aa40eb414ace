"""Suites: prompts with their categories, by name or from a text, CSV, TSV or parquet file."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from acpo_dist.core.errors import DataError
from acpo_dist.core.seeding import derive_seed
from acpo_dist.core.types import PromptGroup, SamplePlan
from acpo_dist.data.parquet_images import parquet_rows
from acpo_dist.data.prompts import SizeMix
from acpo_dist.data.tables import read_lines, read_table
from acpo_dist.data.toy.world import SHAPES, captions

DATA_VARIABLE = "ACPO_DATA"
NAMED = {"drawbench": ("drawbench.csv",), "parti": ("partiprompts.tsv", "parti_prompts.tsv", "parti-prompts.tsv")}
"""Suites that are looked up by file name, ignoring case, in the folders of `ACPO_DATA`."""
UNCONDITIONAL = "none"
_UNPROMPTED = 256
"""Number of samples of the suite `none` without a limit."""


@dataclass(frozen=True, kw_only=True)
class SuitePrompt:
    """One prompt of a suite."""

    prompt_id: int
    """Position in the complete suite, from 0."""
    prompt: str
    category: str
    """Empty if the suite has no categories."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts in file order."""

    name: str
    prompts: tuple[SuitePrompt, ...]
    total: int
    """Number of prompts in the complete suite, of which `prompts` may be a part."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the used prompts and categories."""
        rows = [[entry.prompt_id, entry.prompt, entry.category] for entry in self.prompts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def categories(self) -> list[str]:
        """Categories in order of appearance; empty if the suite has none."""
        return [name for name in dict.fromkeys(entry.category for entry in self.prompts) if name]


def load_suite(
    name: str, *, limit: int | None = None, prompt_column: str = "prompt", category_column: str = "category"
) -> Suite:
    """Load a suite.

    Args:
        name: `drawbench`, `parti`, `toy` (captions of the toy world), `none` (no prompts, for an unconditional model),
            or a file: .txt with one prompt per line; .csv, .tsv or .parquet with a header.
        limit: number of prompts, spread evenly over the suite, so that a suite sorted by category keeps all of them.
        prompt_column: prompt column of a table, ignoring case.
        category_column: category column of a table, ignoring case; may be absent.

    Returns:
        The suite.

    Raises:
        DataError: the suite is unknown, or the file is missing, unreadable or without prompts.
    """
    if name == UNCONDITIONAL:
        count = limit or _UNPROMPTED
        prompts = tuple(SuitePrompt(prompt_id=index, prompt="", category="") for index in range(count))
        return Suite(name=name, prompts=prompts, total=count)
    if name == "toy":
        rows = [(text, next(shape for shape in SHAPES if shape in text)) for text in captions()]
    else:
        rows = _read(_find(name), prompt_column, category_column)
    entries = [
        SuitePrompt(prompt_id=index, prompt=prompt.strip(), category=category.strip())
        for index, (prompt, category) in enumerate(rows)
        if prompt.strip()
    ]
    if not entries:
        raise DataError(f"--suite {name}: the file holds no prompt.")
    count = min(limit or len(entries), len(entries))
    chosen = tuple(entries[index * len(entries) // count] for index in range(count))
    return Suite(name=name if name in (*NAMED, "toy") else Path(name).stem, prompts=chosen, total=len(entries))


def sample_groups(suite: Suite, *, samples_per_prompt: int, seed: int, mix: SizeMix | None = None) -> list[PromptGroup]:
    """Create one group per prompt.

    The seed of a sample depends only on `seed`, the prompt's text and the sample's number. Models are therefore
    compared on the same noise, and a prompt has the same samples in every suite.

    Args:
        suite: prompts.
        samples_per_prompt: samples per group.
        seed: root seed.
        mix: sizes of the images; None leaves the size to the model. The size of a prompt depends only on `seed` and
            the prompt's place in the whole suite.

    Returns:
        The groups, in suite order.
    """
    seen: dict[str, int] = {}
    groups = []
    for entry in suite.prompts:
        occurrence = seen[entry.prompt] = seen.get(entry.prompt, -1) + 1
        size = mix.pick(entry.prompt_id, "evaluation", seed) if mix else None
        samples = tuple(
            SamplePlan(
                sample_id=f"{entry.prompt_id:05d}-{number}", prompt_id=entry.prompt_id, prompt=entry.prompt,
                seed=derive_seed("evaluation", seed, entry.prompt, occurrence, number), size=size,
            )
            for number in range(samples_per_prompt)
        )  # fmt: skip
        groups.append(PromptGroup(prompt_id=entry.prompt_id, prompt=entry.prompt, samples=samples))
    return groups


def _find(name: str) -> Path:
    if name not in NAMED:
        path = Path(name)
        if path.is_file():
            return path
        found = "a folder" if path.is_dir() else "no such file, and no suite of that name"
        raise DataError(
            f"--suite {name}: {found}. Known: {', '.join(NAMED)}, toy, {UNCONDITIONAL} "
            "(for an unconditional model); or give a .txt, .csv, .tsv or .parquet file."
        )
    folders = [folder for folder in os.environ.get(DATA_VARIABLE, "").split(os.pathsep) if folder]
    for folder in folders:
        for path in sorted(Path(folder).glob("*")):
            if path.name.casefold() in NAMED[name] and path.is_file():
                return path
    where = f"is not in {', '.join(folders)}" if folders else f"cannot be found, since {DATA_VARIABLE} is unset"
    raise DataError(
        f"--suite {name}: its file ({NAMED[name][0]}) {where}. Nothing is downloaded: set {DATA_VARIABLE} to the "
        "folder that holds the file, or give its path as --suite."
    )


def _read(path: Path, prompt_column: str, category_column: str) -> list[tuple[str, str]]:
    """Return (prompt, category) of every row."""
    kind = path.suffix.lower()
    try:
        if kind == ".txt":
            return [(line, "") for line in read_lines(path, "--suite")]
        if kind == ".parquet":
            with pq.ParquetFile(path) as file:
                header = list(file.schema_arrow.names)
                places = _places(path, header, prompt_column, category_column)
                table = parquet_rows(file, path, [header[place] for place in places if place is not None])
                return [tuple(_text(row, header, place) for place in places) for row in table]  # pyright: ignore[reportReturnType]
        if kind not in (".csv", ".tsv"):
            raise DataError(f"--suite: expected a .txt, .csv, .tsv or .parquet file, found `{path}`.")
        table = read_table(path, "--suite")
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"--suite: {path} cannot be read: {error}") from error
    header = list(table.header)
    prompt, category = _places(path, header, prompt_column, category_column)
    return [(_cell(row.cells, prompt), _cell(row.cells, category)) for row in table.rows]


def _places(path: Path, header: list[str], prompt_column: str, category_column: str) -> tuple[int | None, int | None]:
    names = [name.strip().casefold() for name in header]
    if prompt_column.casefold() not in names:
        raise DataError(
            f"--suite: {path} has no column `{prompt_column}` (--prompt-column). Columns found: {', '.join(header)}."
        )
    category = names.index(category_column.casefold()) if category_column.casefold() in names else None
    return names.index(prompt_column.casefold()), category


def _text(row: dict[str, Any], header: list[str], place: int | None) -> str:
    value = None if place is None else row[header[place]]
    return "" if value is None else str(value)


def _cell(row: tuple[str, ...], place: int | None) -> str:
    return row[place] if place is not None else ""
