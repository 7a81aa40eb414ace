"""Shows a followed run on a console."""

from rich.live import Live

from acpo_dist.analysis.report.follow import follow
from acpo_dist.analysis.report.record import RunRecord
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.panel import LivePanel, clock

_STALE_S = 30.0


def show_now(record: RunRecord, console: Console) -> None:
    """The panel as it stands."""
    panel = LivePanel(record.name)
    for row in record.rows:
        panel.add(int(row["iteration"]) + 1, record.total or record.done, record.with_gains(row))
    console.rich.print(panel)


def show_until_end(record: RunRecord, console: Console, *, wait_s: float) -> None:
    """Live on a terminal, one line per iteration elsewhere; ends with the run, or after `wait_s` of silence."""
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
                # Of what was there before, the last line is enough.
                if live is None and (not first or index == len(rows) - 1):
                    console.iteration(done, max(total, done), row)
            first, over = False, ended or silence > wait_s
            if live is not None:
                panel.note = f"nothing new for {clock(silence)}" if silence > _STALE_S and not ended else ""
                if panel:
                    live.start()
                    live.update(panel, refresh=True)
            if not ended and silence > wait_s:
                console.message(
                    f"{record.root}: no new iteration for {clock(silence)}; the run may be dead, or slow (--wait-s)"
                )
    finally:
        if live is not None:
            live.stop()
    if not over:
        console.message(f"{record.root}: the process that drove it has ended; `acpo train ... --resume auto` goes on")
