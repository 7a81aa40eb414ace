"""A heat map as inline SVG, on a scale of colours that all eyes can order."""

import math
from collections.abc import Sequence
from html import escape

from acpo_dist.analysis.report.svg import WIDTH

_RAMP = ((0, 32, 77), (59, 73, 110), (102, 105, 112), (146, 139, 118), (194, 175, 104), (255, 234, 70))
"""Cividis, thinned: dark is little; equal steps look equal with and without colour vision."""
_LEFT, _RIGHT, _TOP, _LEGEND = 62, 12, 8, 52
_ROW = 22
_MOST_TEXTS = 9
"""Columns up to which every cell carries its value."""


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], *, row_label: str,
    column_label: str, unit: str,
) -> str:  # fmt: skip
    """Positive values on a logarithmic scale of colours; each cell says its own value.

    Args:
        values: one sequence per row, one value per column; None leaves the cell empty.
        unit: what the values are.
    """
    known = [value for row in values for value in row if value is not None and value > 0]
    if not known:
        return '<p class="empty">No drift was measured.</p>'
    low, high = math.log10(min(known)), math.log10(max(known))
    width = (WIDTH - _LEFT - _RIGHT) / len(columns)
    bottom = _TOP + _ROW * len(rows)
    parts = []
    for index, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = _TOP + _ROW * index
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for column, (head, value) in enumerate(zip(columns, row, strict=True)):
            if value is not None:
                about = f"{row_label} {name}, {column_label} {head}: {value:.3g}"
                parts.append(_cell(value, low, high, _LEFT + width * column, y, width, len(columns), about))
    step = math.ceil(len(columns) / _MOST_TEXTS)
    for column in range(0, len(columns), step):
        x = _LEFT + width * (column + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(columns[column])}</text>')
    parts.append(_names(row_label, column_label, bottom))
    parts.append(_scale(10**low, 10**high, bottom + _LEGEND, unit))
    label = escape(f"{unit} by {row_label} and {column_label}", quote=True)
    return (
        f'<svg class="chart heat" viewBox="0 0 {WIDTH} {bottom + _LEGEND + 34}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def shade(share: float) -> tuple[int, int, int]:
    """Colour at a share of the scale from 0 to 1."""
    place = min(1.0, max(0.0, share)) * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    part = place - index
    low, high = _RAMP[index], _RAMP[index + 1]
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def ink_on(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever is read better: never under a contrast of 4.5."""
    return "#000" if (luminance(colour) + 0.05) ** 2 > 1.05 * 0.05 else "#fff"


def luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance of an sRGB colour, from 0 to 1. Source: WCAG 2.2."""
    linear = [(c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _cell(value: float, low: float, high: float, x: float, y: float, width: float, count: int, about: str) -> str:
    share = (math.log10(value) - low) / (high - low) if value > 0 and high > low else 0.0
    colour = shade(share)
    box = (
        f'<rect x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="{_ROW - 1}" fill="rgb{colour}">'
        f"<title>{escape(about)}</title></rect>"
    )
    if count > _MOST_TEXTS:
        return box
    middle = f'x="{x + width / 2:.1f}" y="{y + 15}"'
    return box + f'<text class="cell" {middle} text-anchor="middle" style="fill:{ink_on(colour)}">{value:.2g}</text>'


def _names(row_label: str, column_label: str, bottom: float) -> str:
    across = f'x="{(_LEFT + WIDTH) / 2}" y="{bottom + 34}"'
    down = f'x="{-(_TOP + bottom) / 2}" y="13" transform="rotate(-90)"'
    return (
        f'<text class="name" {across} text-anchor="middle">{escape(column_label)}</text>'
        f'<text class="name" {down} text-anchor="middle">{escape(row_label)}</text>'
    )


def _scale(low: float, high: float, top: float, unit: str) -> str:
    steps = 24
    width = (WIDTH - _LEFT - _RIGHT) / steps
    boxes = "".join(
        f'<rect x="{_LEFT + width * index:.1f}" y="{top}" width="{width + 0.5:.1f}" height="9" '
        f'fill="rgb{shade(index / (steps - 1))}"/>'
        for index in range(steps)
    )
    below = top + 25
    return (
        f'{boxes}<text x="{_LEFT}" y="{below}">{low:.2g}</text>'
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{below}" text-anchor="middle">{escape(unit)}</text>'
        f'<text x="{WIDTH - _RIGHT}" y="{below}" text-anchor="end">{high:.2g}</text>'
    )
