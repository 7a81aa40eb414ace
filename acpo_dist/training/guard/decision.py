"""The guard's decisions and their reasons, for the loop, for tracking and for messages."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from acpo_dist.training.guard.rules import Level

Action = Literal["none", "warn", "lower_reward", "stop", "roll_back"]

WORDING = {
    "hacking_gap": "the reward has gained {value:.2f} base standard deviations more than the judges",
    "judge_below_base": "judge `{what}` is {value:.2f} base standard deviations below the base model",
    "judge_fall": "judge `{what}` has fallen {value:.2f} base standard deviations from the best of this run",
    "diversity_lost": "{value:.0%} of the base model's diversity is gone",
    "content_shift": "`{what}` of the images has moved {value:.2f} base standard deviations",
    "drift": "drift is {value:.2f} times its budget",
}
"""Message of each kind of rule; `what` is the judge or statistic."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One rule at level `warn` or `stop`."""

    rule: str
    level: Level
    value: float
    """Smoothed, higher is worse."""
    warn: float
    stop: float | None

    @property
    def text(self) -> str:
        """Return the reason as a sentence with value and limits."""
        kind, _, what = self.rule.partition("/")
        stop = "no stop limit" if self.stop is None else f"stop at {self.stop:g}"
        return f"{WORDING[kind].format(value=self.value, what=what)} (warns at {self.warn:g}, {stop})"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Action after an iteration, and its reasons."""

    iteration: int
    action: Action
    reasons: tuple[Reason, ...]
    """All rules at `warn` or `stop`, highest level first."""
    raised: tuple[str, ...]
    """Rules whose level rose at this check; each gets a log line."""
    metrics: Mapping[str, float]
    """Rule -> smoothed value, higher is worse."""
    stop_shares: Mapping[str, float]
    """Rule -> value as a share of its stop limit (warn limit if it has none)."""
    reward_scale: float
    """Multiplies every reward weight from the next iteration on."""
    best_iteration: int
    """Iteration of the checkpoint to roll back to; 0 is the base model."""

    @property
    def ends(self) -> bool:
        """Whether the run ends here, with exit code 3."""
        return self.action in ("stop", "roll_back")

    @property
    def text(self) -> str:
        """Return one line per reason."""
        return "\n".join(reason.text for reason in self.reasons)

    def to_metrics(self) -> dict[str, float]:
        """Return metrics for tracking: `guard/<rule>` as shares of the stop limits, reward scale and best iteration."""
        shares = {f"guard/{name}": value for name, value in self.stop_shares.items()}
        return shares | {"guard/reward_scale": self.reward_scale, "guard/best_iteration": float(self.best_iteration)}

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Decision":
        """Inverse of `to_mapping`, also after JSON."""
        reasons = tuple(Reason(**reason) for reason in data["reasons"])
        return cls(**{**data, "reasons": reasons, "raised": tuple(data["raised"])})
