"""Console output of a run, on stderr: progress of each phase, a line or a live panel per iteration, tables."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import rich.box
import rich.console
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from acpo_dist.core.ports import Advance
from acpo_dist.tracking.panel import LivePanel

SHOWN = ("reward/*/mean", "judge/*/mean", "drift/rms", "drift/budget", "anchor/weight", "time/iteration")
"""Metrics in the line per iteration, in this order; `metrics.jsonl` has all metrics."""

_UNBOUNDED = 10_000


class Console:
    """Writes to stderr, so that stdout holds only the result of a command.

    Args:
        quiet: print nothing.
        live: on a terminal, a panel with the key metrics replaces the line per iteration.
        rich_console: where to write; None is stderr. Its terminal decides whether progress is shown live.
    """

    def __init__(
        self, *, quiet: bool = False, live: bool = False, rich_console: rich.console.Console | None = None
    ) -> None:
        self.rich = rich_console or rich.console.Console(stderr=True)
        self._quiet = quiet
        self._panel = LivePanel() if live and self.rich.is_terminal else None
        self._progress: Progress | None = None

    @contextmanager
    def phase(self, name: str, total: int | None) -> Iterator[Advance]:
        """Show a phase while the block runs: count, rate and remaining time, on a terminal only.

        Args:
            name: name of the phase, such as `rollout`.
            total: number of samples; None if unknown.

        Yields:
            A function to call with the number of samples just finished, from any thread.
        """
        if self._quiet or not self.rich.is_terminal:
            yield _ignore
            return
        outermost = self._progress is None
        progress = self._progress or _new_progress(self.rich, self._panel)
        if outermost:
            self._progress = progress
            progress.start()
        task = progress.add_task(name, total=total)
        try:
            yield lambda count: progress.advance(task, count)
        finally:
            progress.refresh()  # The last count is shown even if the phase was short.
            progress.remove_task(task)
            if outermost:
                self._progress = None
                progress.stop()

    def iteration(self, iteration: int, total: int, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Print one line with the metrics named in `SHOWN`, or update the panel, which remains on the screen.

        Args:
            iteration: number of completed iterations.
            total: number of iterations of the run.
            metrics: metrics of the iteration.
            last: whether the run ends after this iteration, although `total` is larger.
        """
        if self._panel is not None and not self._quiet:
            self._panel.add(iteration, total, metrics)
            if last or iteration == total:
                self.rich.print(self._panel)
            return
        names = dict.fromkeys(name for pattern in SHOWN for name in metrics if fnmatchcase(name, pattern))
        values = [f"{name} {_value(name, metrics[name])}" for name in names]
        self.message("  ".join([f"iteration {iteration:>{len(str(total))}}/{total}", *values]))

    def message(self, text: str) -> None:
        """Print plain text: brackets are not markup, and the terminal wraps long lines."""
        if not self._quiet:
            self.rich.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table on stderr; see `print_table`."""
        if not self._quiet:
            print_table(title, columns, rows, self.rich)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    console: rich.console.Console | None = None,
) -> None:
    """Print a table; on a terminal long cells are wrapped, elsewhere every row is one line of any length.

    Args:
        title: line above the table.
        columns: names of the columns.
        rows: one cell per column; floats are shown with four significant digits.
        console: where to print; None is standard output, for tables that are a command's result.

    Raises:
        ValueError: a row does not have one cell per column.
    """
    console = console or rich.console.Console(file=sys.stdout)
    table = Table(title=Text(title), title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"table {title!r}: {len(columns)} columns, but a row with {len(row)} cells: {row!r}")
        table.add_row(*(Text(_cell(cell)) for cell in row))
    width = console.width
    if not console.is_terminal:
        console.width = _UNBOUNDED
    try:
        console.print(table)
    finally:
        console.width = width


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class _PanelProgress(Progress):
    """Progress bars below the key metrics; the panel is shown while a phase runs."""

    def __init__(self, *columns: ProgressColumn, panel: LivePanel | None, console: rich.console.Console) -> None:
        self._key_metrics = panel
        super().__init__(*columns, console=console, transient=True)

    def get_renderables(self) -> Iterator[RenderableType]:
        if self._key_metrics:
            yield self._key_metrics
        yield self.make_tasks_table(self.tasks)


def _new_progress(console: rich.console.Console, panel: LivePanel | None) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Rate())
    return _PanelProgress(*columns, TimeRemainingColumn(), panel=panel, console=console)


def _ignore(count: int) -> None:
    """Ignores progress."""


def _value(name: str, value: float) -> str:
    return f"{value:.1f} s" if name.startswith("time/") and math.isfinite(value) else _cell(value)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
