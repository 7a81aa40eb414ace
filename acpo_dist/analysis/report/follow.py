"""Follows a run's `metrics.jsonl` while another process writes it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from acpo_dist.analysis.report.record import RunRecord, read_run
from acpo_dist.tracking.jsonl import parse_object
from acpo_dist.training.run_folder import METRICS
from acpo_dist.training.run_lock import lock_holder, sign_of

POLL_S = 1.0
_LOOKS = 3
"""How often in a row nobody must be seen to drive a run that was driven: shared storage may fail for a moment."""


class Follower:
    """New complete lines of a file since the last look; a line that is still being written waits for its end."""

    def __init__(self, path: Path) -> None:
        """Begin at the file's start."""
        self._path, self._at = path, 0
        self.broken = 0
        """Complete lines so far that are no JSON objects."""

    def new_rows(self) -> list[dict[str, Any]]:
        """What has come; a file that was cut (a resumed run does that) is read from its start again."""
        if not self._path.is_file():
            return []
        if self._path.stat().st_size < self._at:
            self._at = 0
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        parsed = [parse_object(line) for line in whole.split(b"\n") if line.strip()]
        self.broken += sum(row is None for row in parsed)
        return [row for row in parsed if row is not None]


def follow(
    root: Path, *, wait_s: float, sleep: Callable[[float], None] = time.sleep
) -> Iterator[tuple[list[dict[str, Any]], float, bool]]:
    """Look at a run again and again, until it has ended, its driver has, or it has been silent for too long.

    Args:
        wait_s: longest silence, in seconds.

    Yields:
        (new training rows with gains where they are known, seconds of silence, whether the run has ended).
    """
    follower, last = Follower(root / METRICS), time.monotonic()
    record: RunRecord | None = None
    absent = _LOOKS
    while True:
        # Before the rows: what its last moment wrote must not be missed.
        driver = lock_holder(root)
        absent = 0 if driver is not None else absent + 1
        left = absent == _LOOKS if driver is None else sign_of(driver) == "gone"
        rows = follower.new_rows()
        if rows:
            last = time.monotonic()
        trained = [row for row in rows if any(key.startswith("reward/") for key in row)]
        if trained and (record is None or not record.normalisers):
            record = read_run(root)  # the first checkpoint brings what turns scores into gains
        ended = any(key.startswith("gain/") for row in rows for key in row)
        silence = time.monotonic() - last
        yield [record.with_gains(row) if record else row for row in trained], silence, ended
        if ended or left or silence > wait_s:
            return
        sleep(POLL_S)
