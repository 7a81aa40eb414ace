"""Running means and rules with hysteresis, as pure functions of their state."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from acpo_dist.config.guard import Limits

Level = Literal["ok", "warn", "stop"]


@dataclass(frozen=True, kw_only=True)
class RunningMean:
    """Exponentially weighted mean without start-up bias: the weights of the values seen so far sum to one."""

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        """The mean so far.

        Raises:
            ZeroDivisionError: no value was added.
        """
        return self.total / self.weight

    def add(self, value: float, smoothing: float) -> "RunningMean":
        """Mean with one more value, whose weight is `smoothing` in the long run."""
        return RunningMean(
            total=(1 - smoothing) * self.total + smoothing * value, weight=(1 - smoothing) * self.weight + smoothing
        )


@dataclass(frozen=True, kw_only=True)
class RuleState:
    """Where a rule stands."""

    level: Level = "ok"
    over_warn: int = 0
    """Consecutive checks at or over the limit."""
    over_stop: int = 0
    over_gross: int = 0
    """Consecutive checks far beyond the stop limit, each taken alone."""

    def to_mapping(self) -> dict[str, Any]:
        """Plain data for `state.json`; `RuleState(**mapping)` restores it."""
        return asdict(self)


def step(state: RuleState, figure: float, limits: Limits, *, patience: int, release: float) -> RuleState:
    """One check.

    A rule rises after `patience` consecutive checks at or over a limit, and falls back to `ok` only under `release`
    times its warn limit: a figure that hovers at a limit neither flickers nor is forgotten.

    Args:
        figure: higher is worse, in the unit of the limits.
    """
    over_warn = state.over_warn + 1 if figure >= limits.warn else 0
    over_stop = state.over_stop + 1 if limits.stop is not None and figure >= limits.stop else 0
    level: Level = state.level
    if figure < release * limits.warn:
        level = "ok"
    elif over_stop >= patience:
        level = "stop"
    elif over_warn >= patience and level == "ok":
        level = "warn"
    return replace(state, level=level, over_warn=over_warn, over_stop=over_stop)


def step_gross(state: RuleState, figure: float, line: float, *, patience: int) -> RuleState:
    """The same check once more, after `step`, on the value of this iteration alone.

    Args:
        figure: unsmoothed value.
        line: far beyond the stop limit; the rule goes to `stop` after `patience` consecutive checks at or over it.
    """
    over = state.over_gross + 1 if figure >= line else 0
    return replace(state, level="stop" if over >= patience else state.level, over_gross=over)
