"""The summary of a run: a verdict in one sentence, and the key figures as cards."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from acpo_dist.analysis.report.charts import PHASES
from acpo_dist.analysis.report.html import duration, short, signed
from acpo_dist.analysis.report.metrics import GuardView, RunMetrics, verdict
from acpo_dist.analysis.report.record import RunRecord
from acpo_dist.tracking.panel import SIGMA

_SIGNS = {
    "good": ("✓", "Looks sound"),
    "caution": ("!", "Look closer"),
    "bad": ("✕", "Do not ship"),
    "unknown": ("?", "Not known"),
}
_NAMED_SHARE = 0.15
"""A narrower piece of the bar has no room for its name on a phone; the table below has it."""
_GUARD_TONES = {"quiet": "good", "near a limit": "caution", "over a limit": "bad", "stopped": "bad", "off": "unknown"}


def verdict_banner(metrics: RunMetrics) -> str:
    """Sign, two words and a sentence: never colour alone."""
    tone, sentence = verdict(metrics)
    sign, word = _SIGNS[tone]
    return (
        f'<div class="verdict {tone}"><span class="sign" aria-hidden="true">{sign}</span>'
        f"<p><strong>{word}.</strong> {escape(sentence)}</p></div>"
    )


def summary_cards(metrics: RunMetrics) -> str:
    """One card per key figure."""
    cards = []
    when = "final weights" if metrics.final else "mean of the last five iterations"
    for name, value in metrics.gains.items():
        role = metrics.roles.get(name, "judge")
        cards.append(
            _card(f"{role} gain", f"{signed(value)} {SIGMA}", f"{name}, {when}", key=f"gain/{name}", value=value)
        )
    budget = f"budget {short(metrics.budget)}" if metrics.budget is not None else "no budget"
    meter = _meter(metrics.drift, metrics.budget)
    cards.append(_card("rms drift", short(metrics.drift), budget + meter, key="drift", value=metrics.drift, raw=True))
    guard = metrics.guard
    cards.append(_card("guard", guard.state, guard.text, tone=_GUARD_TONES[guard.state]))
    if metrics.diversity is not None:
        text = "within-prompt distance, of the base model's"
        cards.append(_card("diversity", f"{metrics.diversity:.0%}", text, key="diversity", value=metrics.diversity))
    each = f"{metrics.iterations} iterations, {duration(metrics.seconds / metrics.iterations)} each" if (
        metrics.seconds is not None and metrics.iterations
    ) else f"{metrics.iterations} iterations"  # fmt: skip
    cards.append(_card("time", duration(metrics.seconds), each, key="seconds", value=metrics.seconds))
    return f'<div class="cards">{"".join(cards)}</div>'


def guard_bullets(guard: GuardView) -> str:
    """Every rule as a bar towards its stop limit, with a mark where it warns."""
    items = []
    for rule in guard.rules:
        share = min(1.0, max(0.0, rule.share / 1.25))
        word = "over" if rule.share >= 1 else "warns" if rule.share >= rule.warn_share else "ok"
        items.append(
            f'<li class="{word}"><span class="what">{escape(rule.rule.replace("_", " "))}</span>'
            f'<span class="bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i>'
            f'<b style="left:{80 * rule.warn_share:.1f}%"></b><b class="stop" style="left:80%"></b></span>'
            f'<span class="much">{rule.share:.0%} · {word}</span></li>'
        )
    return f'<ul class="bullets">{"".join(items)}</ul>' if items else '<p class="empty">No rule was at work.</p>'


def shift_bars(shifts: Mapping[str, float]) -> str:
    """Shifts to both sides of nothing."""
    reach = max(1.0, *(abs(value) for value in shifts.values()))
    items = []
    for name, value in shifts.items():
        width = 50 * abs(value) / reach
        left = 50 - width if value < 0 else 50
        items.append(
            f'<li><span class="what">{escape(name.replace("_", " "))}</span>'
            f'<span class="bar both" aria-hidden="true"><i style="left:{left:.1f}%;width:{width:.1f}%"></i></span>'
            f'<span class="much">{signed(value)} {SIGMA}</span></li>'
        )
    return f'<ul class="bullets">{"".join(items)}</ul>'


def phase_bar(record: RunRecord) -> tuple[str, list[list[str]]]:
    """(share of each phase as one bar, rows of a table)."""
    sums = {phase: sum(row.get(f"time/{phase}") or 0.0 for row in record.rows) for phase in PHASES}
    whole = sum(row.get("time/iteration") or 0.0 for row in record.rows)
    sums["other"] = max(0.0, whole - sum(sums.values()))
    whole = sum(sums.values())
    if not whole:
        return "", []
    reserved = _reserved(record.config)
    pieces, rows = [], []
    for index, (phase, seconds) in enumerate(sums.items()):
        share = seconds / whole
        name = f"<em>{phase}</em>" if share > _NAMED_SHARE else ""
        pieces.append(f'<span class="tone-{index}" style="flex-grow:{max(share, 0.004):.4f}">{name}</span>')
        count = len(record.rows)
        rows.append([phase, duration(seconds), f"{share:.0%}", duration(seconds / count), reserved.get(phase, "-")])
    text = ", ".join(f"{phase} {seconds / whole:.0%}" for phase, seconds in sums.items())
    return f'<div class="phases" role="img" aria-label="{escape(text, quote=True)}">{"".join(pieces)}</div>', rows


def _reserved(config: Mapping[str, Any]) -> dict[str, str]:
    """What each role reserves while the run goes, as its configuration says."""
    rollout, rewards, learner = (config.get(name) or {} for name in ("rollout", "rewards", "learner"))
    metrics = len(rewards.get("train") or ()) + len(rewards.get("judges") or ())
    roles: Sequence[tuple[str, Any, Mapping[str, Any], str]] = (
        ("rollout", rollout.get("num_workers"), rollout, "worker"),
        ("reward", (rewards.get("replicas") or 0) * metrics, rewards, "replica"),
        ("learn", learner.get("num_ranks"), learner, "rank"),
    )
    return {
        phase: f"{count} x {short(section.get(f'cpus_per_{unit}'))} CPU, {short(section.get(f'gpus_per_{unit}'))} GPU"
        for phase, count, section, unit in roles
        if count
    }


def _card(
    title: str, figure: str, text: str, *, key: str = "", value: float | None = None, tone: str = "", raw: bool = False
) -> str:
    """`raw` text is HTML already."""
    exact = f' data-figure="{escape(key, quote=True)}" data-value="{value!r}"' if key and value is not None else ""
    shown = text if raw else escape(text)
    return (
        f'<div class="card {tone}"><h3>{escape(title)}</h3><p class="big"{exact}>{escape(figure)}</p>'
        f'<p class="small">{shown}</p></div>'
    )


def _meter(drift: float | None, budget: float | None) -> str:
    if drift is None or not budget:
        return ""
    share = drift / budget
    kind = "meter over" if share > 1 else "meter"
    return (
        f'<span class="{kind}" role="img" aria-label="{share:.0%} of the budget">'
        f'<i style="width:{100 * min(1.0, share):.1f}%"></i></span>{share:.0%} of it'
    )
