"""Follow a run's `metrics.jsonl` while another process writes it, and show it on a console."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.live import Live

from acpo_dist.analysis.report.record import RunRecord, read_run
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.jsonl import parse_object
from acpo_dist.tracking.panel import LivePanel, clock
from acpo_dist.training.run_folder import METRICS
from acpo_dist.training.run_lock import lock_holder, sign_of

POLL_S = 1.0
_LOOKS = 3
"""Consecutive polls without a run lock after which the run counts as ended: shared storage may fail briefly."""
_STALE_S = 30.0
"""Seconds without a new row after which the panel reports it."""


class Follower:
    """Reads new complete lines of a file; an incomplete last line is read once it is complete."""

    def __init__(self, path: Path) -> None:
        """Start at the beginning of the file."""
        self._path, self._at = path, 0
        self.broken = 0
        """Number of complete lines so far that are not JSON objects."""

    def new_rows(self) -> list[dict[str, Any]]:
        """Return the rows since the last call; a file that became shorter (a resumed run) is read from its start."""
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
    """Poll a run until it ends, its process ends, or no row arrives for `wait_s` seconds.

    Args:
        root: run folder.
        wait_s: longest time without a new row, in seconds.
        sleep: waits between two polls.

    Yields:
        (new training rows with gains where they are known, seconds since the last row, whether the run has ended).
    """
    follower, last = Follower(root / METRICS), time.monotonic()
    record: RunRecord | None = None
    absent = _LOOKS
    while True:
        # Read before the rows, so that rows written just before the lock was released are included.
        holder = lock_holder(root)
        absent = 0 if holder is not None else absent + 1
        left = absent == _LOOKS if holder is None else sign_of(holder) == "gone"
        rows = follower.new_rows()
        if rows:
            last = time.monotonic()
        trained = [row for row in rows if any(key.startswith("reward/") for key in row)]
        if trained and (record is None or not record.normalisers):
            record = read_run(root)  # The first checkpoint contains the normalisers for gains.
        ended = any(key.startswith("gain/") for row in rows for key in row)
        silence = time.monotonic() - last
        yield [record.with_gains(row) if record else row for row in trained], silence, ended
        if ended or left or silence > wait_s:
            return
        sleep(POLL_S)


def show_now(record: RunRecord, console: Console) -> None:
    """Print the panel with the newest metrics."""
    panel = LivePanel(record.name)
    for row in record.rows:
        panel.add(int(row["iteration"]) + 1, record.total or record.done, record.with_gains(row))
    console.rich.print(panel)


def show_until_end(record: RunRecord, console: Console, *, wait_s: float) -> None:
    """Show a live panel on a terminal, or one line per iteration on other outputs, until the run ends.

    Args:
        record: a run with a folder.
        console: output.
        wait_s: longest time without a new row, in seconds.
    """
    assert record.root is not None
    panel, total = LivePanel(record.name), record.total or 0
    live = Live(console=console.rich, auto_refresh=False) if console.rich.is_terminal else None
    looks = follow(record.root, wait_s=wait_s)
    first, over = True, False
    try:
        for rows, silence, ended in looks:
            for index, row in enumerate(rows):
                done = int(row["iteration"]) + 1
                panel.add(done, max(total, done), row)
                # Of the rows before the first poll only the last is shown.
                if live is None and (not first or index == len(rows) - 1):
                    console.iteration(done, max(total, done), row)
            first, over = False, ended or silence > wait_s
            if live is not None:
                panel.note = f"no new row for {clock(silence)}" if silence > _STALE_S and not ended else ""
                if panel:
                    live.start()
                    live.update(panel, refresh=True)
            if not ended and silence > wait_s:
                console.message(
                    f"{record.root}: no new iteration for {clock(silence)}; the run may have died, or is slow "
                    "(--wait-s)"
                )
    finally:
        if live is not None:
            live.stop()
    if not over:
        console.message(f"{record.root}: its process has ended; continue with `acpo train ... --resume auto`")
