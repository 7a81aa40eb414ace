"""`metrics.jsonl`: one JSON object per iteration, on disk before the next iteration starts."""

import errno
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from acpo_dist.core.files import replace_file
from acpo_dist.core.ports import Tracker

logger = logging.getLogger(__name__)


class JsonlTracker(Tracker):
    """Appends one line per iteration and forces it to disk. Images, texts and tags have their own files.

    A metric that is not finite is written as null and named in a warning. If the disk is full, `log_metrics` raises
    OSError, and the file ends with the last complete line; the next call writes the lines that are missing first.
    """

    def __init__(self, path: Path) -> None:
        """Open the file; an incomplete last line, which a killed process leaves, is removed.

        Args:
            path: the file; its folder is created.

        Raises:
            OSError: the file cannot be opened for writing.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        mend_last_line(path)
        self._path = path
        # Unbuffered: a line that fails halfway must not remain in a buffer and be written before the next one.
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    @override
    def log_metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        # JSON has no NaN.
        values = {name: plain_number(value) for name, value in metrics.items()}
        odd = [name for name, value in values.items() if not math.isfinite(value)]
        if odd:
            said = ", ".join(f"{name}={values[name]}" for name in odd)
            logger.warning("iteration %d: not finite, written as null to %s: %s", iteration, self._path.name, said)
        row = {"iteration": iteration} | {name: None if name in odd else value for name, value in values.items()}
        self._unwritten += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._append()

    @override
    def log_image(self, name: str, iteration: int, path: Path) -> None:
        pass

    @override
    def log_text(self, name: str, text: str) -> None:
        pass

    @override
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        pass

    @override
    def close(self, status: str) -> None:
        try:
            if self._unwritten:
                self._append()
        finally:
            self._file.close()

    def _append(self) -> None:
        start = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(self._unwritten) != len(self._unwritten):
                raise OSError(errno.ENOSPC, "the line was written partially", str(self._path))
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            raise
        self._unwritten = b""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows in file order; lines that are not JSON objects, such as an incomplete last one, are logged.

    Raises:
        OSError: the file cannot be read.
    """
    return [row for _, row in _rows(path)]


def truncate_after(path: Path, iteration: int) -> int:
    """Drop the rows of iteration `iteration` and later, which a resumed run repeats.

    The file is replaced atomically; unreadable lines are dropped too.

    Returns:
        Number of complete rows dropped; 0 if there is no file.

    Raises:
        OSError: the file cannot be read or replaced.
    """
    if not path.exists():
        return 0
    rows = list(_rows(path))
    kept = [line for line, row in rows if isinstance(row.get("iteration"), int) and row["iteration"] < iteration]
    replace_file(path, b"".join(line + b"\n" for line in kept))
    return len(rows) - len(kept)


def mend_last_line(path: Path) -> None:
    """Make the file end with a newline: remove an incomplete last line, or add a missing newline."""
    if not path.exists():
        return
    data = path.read_bytes()
    tail = data[data.rfind(b"\n") + 1 :]
    if not tail:
        return
    if parse_object(tail) is None:
        logger.warning("%s: the last line was incomplete (%d bytes) and was removed", path, len(tail))
        os.truncate(path, len(data) - len(tail))
    else:
        with path.open("ab") as file:
            file.write(b"\n")


def parse_object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object on a line, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def plain_number(value: Any) -> int | float:
    """Convert a number for JSON: int stays int, tensors and numpy scalars become float."""
    return value if isinstance(value, int) else float(value)


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_object(line)
        if row is None:
            torn = "torn" if number == len(lines) else "not a JSON object"
            logger.warning("%s: line %d is %s and was omitted", path, number, torn)
        else:
            yield line, row
