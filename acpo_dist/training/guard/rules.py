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
        """The current mean.

        Raises:
            ZeroDivisionError: no value was added.
        """
        return self.total / self.weight

    def add(self, value: float, smoothing: float) -> "RunningMean":
        """Return the mean with one more value, whose weight is `smoothing` in the long run."""
        return RunningMean(
            total=(1 - smoothing) * self.total + smoothing * value, weight=(1 - smoothing) * self.weight + smoothing
        )


@dataclass(frozen=True, kw_only=True)
class RuleState:
    """Level and counters of a rule."""

    level: Level = "ok"
    over_warn: int = 0
    """Consecutive checks at or over the limit."""
    over_stop: int = 0
    over_gross: int = 0
    """Consecutive checks far beyond the stop limit, each taken alone."""

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data for `state.json`; `RuleState(**mapping)` restores it."""
        return asdict(self)


def step(state: RuleState, value: float, limits: Limits, *, patience: int, release: float) -> RuleState:
    """Check one value against the limits and return the new state.

    A rule rises after `patience` consecutive checks at or over a limit, and returns to `ok` only under `release` times
    its warn limit, so that a value near a limit neither switches the level repeatedly nor is dropped.

    Args:
        value: value in the unit of the limits, higher is worse.
    """
    over_warn = state.over_warn + 1 if value >= limits.warn else 0
    over_stop = state.over_stop + 1 if limits.stop is not None and value >= limits.stop else 0
    level: Level = state.level
    if value < release * limits.warn:
        level = "ok"
    elif over_stop >= patience:
        level = "stop"
    elif over_warn >= patience and level == "ok":
        level = "warn"
    return replace(state, level=level, over_warn=over_warn, over_stop=over_stop)


def step_gross(state: RuleState, value: float, line: float, *, patience: int) -> RuleState:
    """Check the unsmoothed value of this iteration, after `step`.

    Args:
        value: unsmoothed value.
        line: limit far beyond the stop limit; the rule stops after `patience` consecutive checks at or over it.
    """
    over = state.over_gross + 1 if value >= line else 0
    return replace(state, level="stop" if over >= patience else state.level, over_gross=over)
