"""Captions beside images: `.txt` files with the name of the image, and `metadata.jsonl` or `metadata.csv`."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from acpo_dist.core.errors import DataError
from acpo_dist.core.json_text import json_object
from acpo_dist.data.tables import decode_text, parse_table

logger = logging.getLogger(__name__)

CAPTION_COLUMNS = ("caption", "text", "prompt")
"""Columns with the caption, in order of preference, if none is named."""
_METADATA = ("metadata.jsonl", "metadata.csv")
_BESIDE = (".txt", ".caption")


def find_captions(
    place: object, images: Sequence[PurePath], others: Iterable[PurePath], read: Callable[[PurePath], bytes],
    columns: Sequence[str] = CAPTION_COLUMNS,
) -> dict[PurePath, str]:  # fmt: skip
    """Return the captions of the images of a folder or archive.

    `metadata.jsonl` and `metadata.csv` name images relative to their own folder in the column `file_name`. They take
    precedence over a text file beside the image.

    Args:
        place: folder or archive, for messages.
        images: paths of the images.
        others: paths of the other files.
        read: returns the bytes of a file.
        columns: names of the caption in `metadata` files; the first one that exists is used.

    Returns:
        Caption by image; images without a caption, or with an empty one, are missing.

    Raises:
        DataError: a caption is not text, or a `metadata` file cannot be read.
    """
    known = set(images)
    found: dict[PurePath, str] = {}
    texts: dict[PurePath, PurePath] = {}
    unmatched: list[str] = []
    for path in others:
        if path.name in _METADATA:
            for name, caption in _metadata(place, path, read(path), columns):
                image = path.parent / name
                if image in known:
                    found[image] = caption
                else:
                    unmatched.append(f"{path}: {name}")
        elif path.suffix.lower() in _BESIDE:
            texts[path.with_suffix("")] = path
    for image in images:
        beside = texts.pop(image.with_suffix(""), None) or texts.pop(image, None)
        if beside is not None and image not in found:
            found[image] = " ".join(decode_text(read(beside), f"{place}: {beside}").split())
    unmatched += [str(path) for path in texts.values()]
    if unmatched:
        logger.warning("%s: %d captions have no image, such as %s", place, len(unmatched), ", ".join(unmatched[:3]))
    return {image: caption for image, caption in found.items() if caption.strip()}


def caption_of(row: Mapping[str, Any], columns: Sequence[str] = CAPTION_COLUMNS) -> str | None:
    """Return the caption of a row: the first of the columns that exists, "" for an empty cell, None without a column.

    A list of captions, as in data sets with several per image, gives the first one.
    """
    for name in columns:
        if name in row:
            value = row[name]
            value = value[0] if isinstance(value, list) and value else value
            return value if isinstance(value, str) else ""
    return None


def _metadata(
    place: object, path: PurePath, content: bytes, columns: Sequence[str]
) -> Iterable[tuple[str, str]]:  # fmt: skip
    where = f"{place}: {path}"
    text = decode_text(content, where)
    rows = list(parse_table(text, where).records()) if path.suffix == ".csv" else _json_lines(text, where)
    for number, row in enumerate(rows, 1):
        name, caption = row.get("file_name"), caption_of(row, columns)
        if not isinstance(name, str) or caption is None:
            raise DataError(
                f"{place}: {path}, row {number}: expected `file_name` and one of {', '.join(columns)} "
                f"(data.caption_column), found {', '.join(map(str, row))}."
            )
        yield name, caption


def _json_lines(text: str, where: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        rows.append(json_object(line, f"{where}, line {number}", DataError))
    return rows


def read_json_lines(content: bytes, where: str) -> list[dict[str, Any]]:
    """Read the objects of a `.jsonl` file.

    Args:
        content: bytes of the file, in UTF-8 or UTF-16.
        where: name of the file, for messages.

    Raises:
        DataError: a line is no JSON object.
    """
    return _json_lines(decode_text(content, where), where)
