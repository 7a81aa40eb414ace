"""Small pieces of HTML that sections share."""

from collections.abc import Sequence
from html import escape


def block(title: str, *parts: str, hint: str = "") -> str:
    """A titled section; empty parts are left out."""
    note = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{note}{''.join(parts)}</section>"


def figure(title: str, chart: str, *, hint: str = "") -> str:
    """A chart with its caption."""
    note = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f'<figure class="figure"><figcaption>{escape(title)}</figcaption>{note}{chart}</figure>'


def grid(*parts: str) -> str:
    """Parts side by side where there is room."""
    return f'<div class="grid">{"".join(parts)}</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, label: str) -> str:
    """A table that scrolls by itself where the screen is narrow; the first column names the row."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label, quote=True)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    """Content that opens on demand."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def signed(value: float | None, digits: int = 2) -> str:
    """A gain for people."""
    return "-" if value is None else f"{value:+.{digits}f}"


def short(value: float | None) -> str:
    """A figure for people."""
    return "-" if value is None else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
