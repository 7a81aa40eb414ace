"""Small charts as inline SVG: no script needed to read them; the page's style sheet has the colours.

Numbers in user units of a view box that is `WIDTH` wide, whatever the screen.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 44
TONES = 6
"""Colours in the style sheet, `tone-0` and on; each has its own dash and marker."""
_MOST_POINTS = 400
_MARKERS = ("circle", "square", "triangle", "diamond", "cross", "bar")

Point = tuple[float, float | None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve; None is a gap."""

    name: str
    points: Sequence[Point]
    tone: int


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A line across the chart that says where something begins."""

    name: str
    value: float
    upright: bool = False
    """At an x instead of a y."""


@dataclass(frozen=True, kw_only=True)
class Trail:
    """A run in a scatter plot: small points in order, and where it ended."""

    name: str
    points: Sequence[tuple[float, float, str]]
    """(x, y, what it is), in order."""
    end: tuple[float, float, str] | None
    tone: int


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, limits: Sequence[Limit] = ()) -> str:
    """Curves over a common x, with a legend, limits, and the figures for the page's read-out."""
    known_ones = [each for each in series if any(y is not None for _, y in each.points)]
    thin = [Series(name=each.name, points=_thin(each.points), tone=each.tone) for each in known_ones]
    known = [(x, y) for each in thin for x, y in each.points if y is not None]
    if not known:
        return _nothing()
    x_scale, y_scale = _scales(known, limits)
    curves = "".join(_curve(each, x_scale, y_scale) for each in thin)
    # Limits come last, so that no curve covers their names.
    parts = [_frame(x_scale, y_scale, x_label, y_label), curves, _limit_lines(limits, x_scale, y_scale)]
    xs = sorted({x for each in thin for x, _ in each.points})
    values = [{"name": each.name, "values": [dict(each.points).get(x) for x in xs]} for each in thin]
    data = {"label": x_label, "x": xs, "at": [round(x_scale.at(x), 2) for x in xs], "series": values}
    return legend([(each.name, each.tone) for each in thin], lines=True) + _svg(
        "".join(parts), label=f"{y_label} over {x_label}: {', '.join(each.name for each in thin)}", data=data
    )


def scatter_chart(trails: Sequence[Trail], *, x_label: str, y_label: str, limits: Sequence[Limit] = ()) -> str:
    """Trails of points with a large marker at the end of each."""
    known = [(x, y) for trail in trails for x, y, _ in [*trail.points, *([trail.end] if trail.end else [])]]
    if not known:
        return _nothing()
    x_scale, y_scale = _scales(known, limits)
    body = [_frame(x_scale, y_scale, x_label, y_label), _limit_lines(limits, x_scale, y_scale)]
    for trail in trails:
        points = [(x_scale.at(x), y_scale.at(y), text) for x, y, text in trail.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4">{_title(text)}</circle>' for x, y, text in points)
        body.append(f'<g class="tone-{trail.tone % TONES} trail"><polyline points="{path}"/>{dots}</g>')
    for trail in trails:
        if trail.end is not None:
            x, y, text = trail.end
            shape = marker(trail.tone, x_scale.at(x), y_scale.at(y), 7)
            body.append(f'<g class="tone-{trail.tone % TONES} end">{shape}{_title(text)}</g>')
    label = f"{y_label} against {x_label}: {', '.join(trail.name for trail in trails)}"
    return legend([(trail.name, trail.tone) for trail in trails], lines=False) + _svg("".join(body), label=label)


def legend(entries: Sequence[tuple[str, int]], *, lines: bool) -> str:
    """Names with the line or marker that stands for them."""
    items = []
    for name, tone in entries:
        mark = '<line x1="1" y1="6" x2="27" y2="6"/>' if lines else ""
        items.append(
            f'<li><svg class="key tone-{tone % TONES}" viewBox="0 0 28 12" aria-hidden="true">{mark}'
            f"{marker(tone, 14, 6, 4.2)}</svg>{escape(name)}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def marker(tone: int, x: float, y: float, size: float) -> str:
    """The shape that goes with a tone."""
    shape = _MARKERS[tone % TONES]
    if shape == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    if shape == "square":
        return (
            f'<rect class="mark" x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:.1f}" height="{2 * size:.1f}"/>'
        )
    corners = {
        "triangle": ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "cross": ((-1, -0.35), (-0.35, -0.35), (-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35),
                  (1, 0.35), (0.35, 0.35), (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35)),
        "bar": ((-1.3, -0.5), (1.3, -0.5), (1.3, 0.5), (-1.3, 0.5)),
    }[shape]  # fmt: skip
    path = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return f'<polygon class="mark" points="{path}"/>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values between two bounds, about `count` of them."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """Short text of a round value."""
    return f"{value:.4g}" if value else "0"


def _scales(known: Sequence[tuple[float, float]], limits: Sequence[Limit]) -> tuple[_Scale, _Scale]:
    xs = [x for x, _ in known] + [limit.value for limit in limits if limit.upright]
    ys = [y for _, y in known] + [limit.value for limit in limits if not limit.upright]
    (x_low, x_high), (y_low, y_high) = _padded(xs, 0.02), _padded(ys, 0.06)
    return _Scale(x_low, x_high, _LEFT, WIDTH - _RIGHT), _Scale(y_low, y_high, HEIGHT - _BOTTOM, _TOP)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def _frame(x_scale: _Scale, y_scale: _Scale, x_label: str, y_label: str) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value in ticks(y_scale.low, y_scale.high):
        y = y_scale.at(value)
        kind = "zero" if value == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>')
    for value in ticks(x_scale.low, x_scale.high, 4):
        x = x_scale.at(value)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{tick_text(value)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    at = f'x="{-(_TOP + bottom) / 2}" y="13" transform="rotate(-90)"'
    parts.append(f'<text class="name" {at} text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _limit_lines(limits: Sequence[Limit], x_scale: _Scale, y_scale: _Scale) -> str:
    parts = []
    for limit in limits:
        if limit.upright:
            x = x_scale.at(limit.value)
            ends = f'x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{HEIGHT - _BOTTOM}"'
            side, nudge = ("end", -5) if x > WIDTH * 0.6 else ("start", 5)
            text = f'x="{x + nudge:.1f}" y="{_TOP + 11}" text-anchor="{side}"'
        else:
            y = y_scale.at(limit.value)
            ends = f'x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}"'
            text = f'x="{_LEFT + 6}" y="{y - 5:.1f}" text-anchor="start"'
        parts.append(f'<g class="limit"><line {ends}/><text {text}>{escape(limit.name)}</text></g>')
    return "".join(parts)


def _curve(series: Series, x_scale: _Scale, y_scale: _Scale) -> str:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in series.points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x_scale.at(x), y_scale.at(y)))
    pieces = [run for run in runs if run]
    lines = "".join(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in run)}"/>' for run in pieces)
    # A marker now and then says which curve is which without colour; points that stand alone are seen by theirs.
    flat = [point for run in pieces for point in run]
    step = max(1, len(flat) // 5)
    chosen = {0, len(flat) - 1, *range(step // 2, len(flat), step)}
    marks = "".join(marker(series.tone, *flat[index], 3.4) for index in sorted(chosen))
    return f'<g class="tone-{series.tone % TONES} curve">{lines}{marks}</g>'


def _thin(points: Sequence[Point]) -> list[Point]:
    """Every k-th point and the last one: real figures, no means of them."""
    step = max(1, math.ceil(len(points) / _MOST_POINTS))
    return [point for index, point in enumerate(points) if index % step == 0 or index == len(points) - 1]


def _svg(body: str, *, label: str, data: object = None) -> str:
    extra = "" if data is None else f' tabindex="0" data-chart="{escape(json.dumps(data), quote=True)}"'
    cursor = (
        "" if data is None else f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" hidden=""/>'
    )
    output = "" if data is None else '<output class="read">Point at the chart, or use the arrow keys.</output>'
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}"{extra}>'
        f"{body}{cursor}</svg>{output}"
    )


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _nothing() -> str:
    return '<p class="empty">No figures for this chart.</p>'
