"""Key metrics of a run on a few lines of a terminal; shared by `acpo train` and `acpo follow`."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import rich.panel
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
"""Standard deviation of a metric on base samples."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN = "_.-=+*#"
_WIDTH = 28
"""Iterations shown by a spark line."""
_RECENT = 10
"""Number of last iterations whose mean time gives the estimated remaining time."""
_NO_RULE = ("guard/reward_scale", "guard/best_iteration")
_PHASES = ("rollout", "reward", "learn", "sync")
_ROLES = ("rollout", "learner", "reward")


class LivePanel:
    """Collects rows, and renders the newest with a short history."""

    def __init__(self, name: str = "") -> None:
        """Start without rows.

        Args:
            name: name of the run, for the title.
        """
        self._name, self._rows, self._total = name, [], 0
        self.note = ""
        """Last line, such as the age of the metrics."""

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, iteration: int, total: int, row: Mapping[str, Any]) -> None:
        """Add the metrics of an iteration; an iteration that is not newer clears the rows, as for another run.

        Args:
            iteration: number of completed iterations.
            row: as in `metrics.jsonl`, with `<role>/<name>/gain` if gains are known.
        """
        if self._rows and iteration <= self._rows[-1][0]:
            self._rows = []
        self._rows.append((iteration, dict(row)))
        self._total = total

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = _BLOCKS if options.encoding.startswith("utf") else _PLAIN
        body = Table.grid(padding=(0, 2))
        body.add_column(no_wrap=True)
        # Long texts in the last column must not take the values' room.
        body.add_column(no_wrap=True, justify="right", min_width=6)
        body.add_column(no_wrap=True)
        for what, value, extra in self._lines(blocks):
            body.add_row(Text(what), Text(value, style="bold"), Text(extra))
        if self.note:
            body.add_row("", "", Text(self.note, style="dim"))
        yield rich.panel.Panel(body, title=Text(self._title()), title_align="left", expand=False)

    def _title(self) -> str:
        iteration = self._rows[-1][0]
        name = [self._name] if self._name else []
        parts = [*name, f"iteration {iteration}/{self._total}", f"{iteration / max(1, self._total):.0%}"]
        times = [value for value in self._past("time/iteration")[-_RECENT:] if value is not None]
        if times:
            each = fmean(times)
            parts.append(f"{each:.1f} s each")
            if iteration < self._total:
                parts.append(f"{clock(each * (self._total - iteration))} left")
        return " · ".join(parts)

    def _lines(self, blocks: str) -> list[tuple[str, str, str]]:
        row = self._rows[-1][1]
        lines = []
        for role in ("reward", "judge"):
            for key in row:
                if key.startswith(f"{role}/") and key.endswith("/mean"):
                    lines.append(self._score(role, key.removesuffix("/mean"), blocks))
        if row.get("drift/rms") is not None:
            budget = row.get("drift/budget")
            share = f" of {budget:.3g} ({row['drift/rms'] / budget:.0%})" if budget else ""
            lines.append(("drift", f"{row['drift/rms']:.3g}", spark(self._past("drift/rms"), blocks) + share))
        guard = [
            (key[6:], row[key])
            for key in row
            if key.startswith("guard/") and key not in _NO_RULE and row[key] is not None
        ]
        if guard:
            rule, value = max(guard, key=lambda pair: pair[1])
            word = "OVER" if value >= 1 else "nearest"
            scale = row.get("guard/reward_scale", 1.0)
            lowered = f"; reward weights at {scale:g}" if scale != 1 else ""
            lines.append(("guard", f"{value:.0%}", f"{word}: {rule}, of its stop limit{lowered}"))
        times = [f"{phase} {row[f'time/{phase}']:.1f}" for phase in _PHASES if row.get(f"time/{phase}") is not None]
        if times:
            lines.append(("time", f"{row.get('time/iteration') or 0.0:.1f} s", " · ".join(times)))
        idle = {role: row[f"idle/{role}"] for role in _ROLES if row.get(f"idle/{role}") is not None}
        if idle:
            shares = " · ".join(f"{role} {share:.0%}" for role, share in idle.items())
            lines.append(("idle", f"{min(idle.values()):.0%}", shares))
        return lines

    def _score(self, role: str, stem: str, blocks: str) -> tuple[str, str, str]:
        """Format the gain in base standard deviations if known, else the raw mean and its change."""
        name = f"{role} {stem.partition('/')[2]}"
        gains = self._past(f"{stem}/gain")
        if gains[-1] is not None:
            return name, f"{gains[-1]:+.2f} {SIGMA}", spark(gains, blocks)
        past = self._past(f"{stem}/mean")
        first = next((value for value in past if value is not None), None)
        if past[-1] is None or first is None:
            return name, "-", spark(past, blocks)
        return (
            name,
            f"{past[-1]:.4g}",
            f"{spark(past, blocks)} {past[-1] - first:+.3g} since iteration {self._rows[0][0]}",
        )

    def _past(self, key: str) -> list[float | None]:
        return [row.get(key) for _, row in self._rows]


def spark(values: Sequence[float | None], blocks: str = _BLOCKS) -> str:
    """Return the last values as a line of blocks between their minimum and maximum; a gap is a space."""
    shown = [value if value is not None and math.isfinite(value) else None for value in values[-_WIDTH:]]
    known = [value for value in shown if value is not None]
    if not known:
        return ""
    low, spread = min(known), max(known) - min(known)
    top = len(blocks) - 1
    return "".join(
        " " if value is None else blocks[round((value - low) / spread * top) if spread else 0] for value in shown
    )


def clock(seconds: float) -> str:
    """Format hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
