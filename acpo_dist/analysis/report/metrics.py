"""Key metrics of a run, and a one-sentence summary."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from acpo_dist.analysis.report.record import ROLES, RunRecord
from acpo_dist.tracking.panel import SIGMA

Tone = Literal["good", "caution", "bad", "unknown"]
PHASES = ("rollout", "reward", "learn", "sync")
"""Phases of an iteration; `time/<phase>` holds the seconds of each."""
GUARD_KEYS = ("guard/reward_scale", "guard/best_iteration")
"""Metrics below `guard/` that are not rules."""


@dataclass(frozen=True, kw_only=True)
class RuleView:
    """One rule of the guard at the last iteration."""

    rule: str
    share: float
    """Share of its stop limit, or of its warn limit if it has none."""
    warn_share: float
    """Warn limit, in the same unit."""


@dataclass(frozen=True, kw_only=True)
class GuardView:
    """State of the guard."""

    state: Literal["off", "quiet", "near a limit", "over a limit", "stopped"]
    text: str
    rules: tuple[RuleView, ...]
    """Rules, the nearest to its limit first."""


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """One row of `acpo runs` and `acpo compare`, and the cards of a report."""

    name: str
    seed: int
    state: str
    iterations: int
    total: int | None
    gains: Mapping[str, float]
    """In base standard deviations, higher is better."""
    roles: Mapping[str, str]
    """Metric -> `reward` or `judge`."""
    final: bool
    """Whether gains are of the final weights on the calibration prompts, or means of the last five iterations."""
    drift: float | None
    """Rms, in the anchor's own units; mean of the last five iterations."""
    budget: float | None
    diversity: float | None
    """Within-prompt diversity relative to the base model's, from the last report."""
    guard: GuardView
    seconds: float | None
    path: str | None
    mlflow_run_id: str | None
    checkpoints: Sequence[int]
    broken_lines: int

    def mean_gain(self, role: str) -> float | None:
        """Return the mean over the metrics of a role."""
        values = [value for name, value in self.gains.items() if self.roles.get(name) == role]
        return fmean(values) if values else None

    @property
    def quality(self) -> float | None:
        """Return the mean gain of the held-out judges, or of the rewards if there is no judge."""
        judged = self.mean_gain("judge")
        return judged if judged is not None else self.mean_gain("reward")

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        tone, sentence = verdict(self)
        return asdict(self) | {
            "gains": dict(self.gains), "roles": dict(self.roles), "checkpoints": list(self.checkpoints),
            "quality": self.quality, "verdict": sentence, "tone": tone,
        }  # fmt: skip


def metrics_of(record: RunRecord) -> RunMetrics:
    """Compute the key metrics of a record."""
    roles = {name: role for role in ROLES for name in record.metrics_by_role[role]}
    gains = dict(record.gains)
    if not gains:
        recent = {name: [record.gain_of(role, name, row) for row in record.rows[-5:]] for name, role in roles.items()}
        known = {name: [value for value in values if value is not None] for name, values in recent.items()}
        gains = {name: fmean(values) for name, values in known.items() if values}
    seconds = sum(row.get("time/iteration") or 0.0 for row in record.rows) or None
    return RunMetrics(
        name=record.name, seed=record.seed, state=record.state, iterations=record.done, total=record.total,
        gains=gains, roles=roles, final=bool(record.gains), drift=record.recent("drift/rms"), budget=_budget(record),
        diversity=record.extra.get("diversity"), guard=guard_view(record),
        seconds=record.seconds if record.seconds is not None else seconds,
        path=str(record.root) if record.root is not None else None, mlflow_run_id=record.mlflow_run_id,
        checkpoints=list(record.checkpoints), broken_lines=record.broken_lines,
    )  # fmt: skip


def guard_view(record: RunRecord) -> GuardView:
    """Return state and rules of the guard at the last iteration."""
    last: Mapping[str, Any] = record.rows[-1] if record.rows else {}
    config = record.config.get("guard") or {}
    rules = sorted(
        (
            RuleView(rule=key.removeprefix("guard/"), share=float(value), warn_share=_warn_share(config, key[6:]))
            for key, value in last.items()
            if key.startswith("guard/") and key not in GUARD_KEYS and value is not None
        ),
        key=lambda rule: -rule.share / rule.warn_share,
    )
    warned = [event for event in record.guard_events if event.get("raised")]
    since = f"; first reported at iteration {int(warned[0]['iteration']) + 1}" if warned else ""
    if record.guard_end is not None:
        return GuardView(state="stopped", text=_reasons(record.guard_end), rules=tuple(rules))
    if not rules:
        return GuardView(state="off", text="the guard has no measurement", rules=())
    over = [rule for rule in rules if rule.share >= 1]
    near = [rule for rule in rules if rule.share >= rule.warn_share]
    if over:
        return GuardView(state="over a limit", text=f"over the stop limit: {_names(over)}{since}", rules=tuple(rules))
    if near:
        return GuardView(state="near a limit", text=f"over the warn limit: {_names(near)}{since}", rules=tuple(rules))
    nearest = f"nearest to its stop limit: {rules[0].rule} at {rules[0].share:.0%}"
    return GuardView(state="quiet", text=f"{nearest}{since}", rules=tuple(rules))


def verdict(metrics: RunMetrics) -> tuple[Tone, str]:
    """Return (tone, sentence): gain, drift and state of the guard."""
    total = f" of {metrics.total}" if metrics.total is not None else ""
    gained = " and ".join(
        f"the {role} {name} {value:+.2f} base {SIGMA}"
        for role in ROLES
        for name, value in metrics.gains.items()
        if metrics.roles.get(name, "judge") == role
    )
    budget = f" of a budget of {metrics.budget:.3g}" if metrics.budget is not None else ", without a budget"
    drift = f"rms drift {metrics.drift:.3g}{budget}" if metrics.drift is not None else "unknown drift"
    what = f"gained {gained}" if gained else f"gains in base {SIGMA} are unknown, since no checkpoint is left"
    guard = {"stopped": "the guard stopped it", "off": "the guard was off"}.get(
        metrics.guard.state, f"the guard is {metrics.guard.state}"
    )
    sentence = f"After {metrics.iterations}{total} iterations: {what}, at {drift}; {guard}."
    return _tone(metrics), sentence


def _tone(metrics: RunMetrics) -> Tone:
    judged, rewarded = metrics.mean_gain("judge"), metrics.mean_gain("reward")
    over = metrics.budget is not None and metrics.drift is not None and metrics.drift > metrics.budget
    if metrics.guard.state in ("stopped", "over a limit") or (judged is not None and judged < 0):
        return "bad"
    if metrics.guard.state == "near a limit" or over or (rewarded is not None and rewarded <= 0):
        return "caution"
    return "unknown" if rewarded is None else "good"


def _budget(record: RunRecord) -> float | None:
    """Return the controller's budget, or else the guard's reference for drift."""
    told = record.rows[-1].get("drift/budget") if record.rows else None
    if told is None:
        told = (record.config.get("guard") or {}).get("drift_budget")
    return float(told) if told is not None else None


def _warn_share(config: Mapping[str, Any], rule: str) -> float:
    limits = config.get(rule.partition("/")[0]) or {}
    warn, stop = limits.get("warn"), limits.get("stop")
    return float(warn) / float(stop) if warn and stop else 1.0


def _names(rules: Sequence[RuleView]) -> str:
    return ", ".join(f"{rule.rule} at {rule.share:.0%}" for rule in rules[:3])


def _reasons(event: Mapping[str, Any]) -> str:
    if "text" in event:
        return f"stopped: {event['text']}"
    names = ", ".join(str(reason.get("rule")) for reason in event.get("reasons", [])) or "no reason recorded"
    kept = f", rolled back to iteration {event['best_iteration']}" if event.get("action") == "roll_back" else ""
    return f"stopped at iteration {int(event.get('iteration', -1)) + 1} by {names}{kept}"
