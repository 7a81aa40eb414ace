"""Tables that are a command's answer: on standard output, narrow, and one line per row where nobody watches."""

import sys
from collections.abc import Sequence

import rich.box
import rich.console
from rich.table import Table
from rich.text import Text

_UNBOUNDED = 10_000


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print it; long cells are folded on a terminal, and never cut."""
    console = rich.console.Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    table = Table(title=Text(title), title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
