"""On-disk queue of records, which keeps them while the receiver is slow or unreachable."""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from acpo_dist.core.files import replace_file
from acpo_dist.tracking.jsonl import mend_last_line, parse_object

logger = logging.getLogger(__name__)


class Spool:
    """A first-in first-out file of JSON records: any thread appends, one thread sends.

    Args:
        path: the file; it exists only while records are pending. Its folder is created.

    Raises:
        OSError: the folder or the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        mend_last_line(path)
        self.path = path
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._lines())

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            OSError: the disk is full or gone.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock, self.path.open("ab") as file:
            file.write(line)

    def drain(self, send: Callable[[dict[str, Any]], None], lane: Callable[[dict[str, Any]], str]) -> list[Exception]:
        """Send all pending records, oldest first, and remove the sent ones from the file.

        A failure stops only its own lane, so that a broken service does not block others and is called once per lane
        instead of once per record. After a killed process records may be sent twice, so `send` must be idempotent.

        Returns:
            The exceptions of the stopped lanes; empty if all records were sent.
        """
        failures: dict[str, Exception] = {}
        left: list[bytes] = []
        lines = self._lines()
        for line in lines:
            record = parse_object(line)
            if record is None:
                logger.warning("%s: an unreadable record was dropped", self.path)
                continue
            name = lane(record)
            if name not in failures:
                try:
                    send(record)
                    continue
                except Exception as error:  # exceptions of the receiver's library; the caller reports them
                    failures[name] = error
            left.append(line)
        self._forget(len(lines), left)
        return list(failures.values())

    def _lines(self) -> list[bytes]:
        with self._lock:
            return self.path.read_bytes().splitlines() if self.path.exists() else []

    def _forget(self, seen: int, left: list[bytes]) -> None:
        """Replace the first `seen` lines by `left`; lines appended in the meantime follow."""
        if seen == len(left):
            return
        with self._lock:
            lines = left + self.path.read_bytes().splitlines()[seen:]
            if lines:
                replace_file(self.path, b"".join(line + b"\n" for line in lines))
            else:
                self.path.unlink()
