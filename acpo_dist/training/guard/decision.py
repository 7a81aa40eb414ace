"""What the guard decides, and why, for the loop, for tracking and for people."""

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
    "recall_lost": "{value:.0%} of the base model's recall is gone",
    "content_shift": "`{what}` of the images has moved {value:.2f} base standard deviations",
    "drift": "drift is {value:.2f} times its budget",
}
"""How each kind of rule speaks; `what` is the judge or statistic."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One rule that has risen."""

    rule: str
    level: Level
    value: float
    """Smoothed, higher is worse."""
    warn: float
    stop: float | None

    @property
    def text(self) -> str:
        """For people."""
        kind, _, what = self.rule.partition("/")
        stop = "no stop limit" if self.stop is None else f"stop at {self.stop:g}"
        return f"{WORDING[kind].format(value=self.value, what=what)} (warns at {self.warn:g}, {stop})"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do after an iteration, and why."""

    iteration: int
    action: Action
    reasons: tuple[Reason, ...]
    """All rules at `warn` or `stop`, the worst first."""
    raised: tuple[str, ...]
    """Rules that rose at this check: what a log line is due for."""
    metrics: Mapping[str, float]
    """Rule -> smoothed figure, higher is worse."""
    stop_shares: Mapping[str, float]
    """Rule -> figure as a share of its stop limit (warn limit if it has none): 1 is the line in a plot."""
    reward_scale: float
    """Multiplies every reward weight from the next iteration on."""
    best_iteration: int
    """Saved checkpoint to roll back to; 0 is the base model."""

    @property
    def ends(self) -> bool:
        """Whether the run stops here, with exit code 3."""
        return self.action in ("stop", "roll_back")

    @property
    def text(self) -> str:
        """Why, in one line per reason."""
        return "\n".join(reason.text for reason in self.reasons)

    def to_metrics(self) -> dict[str, float]:
        """For tracking: `guard/<rule>` as shares of the stop limits, and what is in force."""
        shares = {f"guard/{name}": value for name, value in self.stop_shares.items()}
        return shares | {"guard/reward_scale": self.reward_scale, "guard/best_iteration": float(self.best_iteration)}

    def to_mapping(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "Decision":
        """The inverse, JSON or not in between."""
        reasons = tuple(Reason(**reason) for reason in data["reasons"])
        return cls(**{**data, "reasons": reasons, "raised": tuple(data["raised"])})
