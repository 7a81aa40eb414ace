"""When a run counts as hacking its reward, and what happens then."""

from typing import Literal

from pydantic import Field, model_validator

from acpo_dist.config.section import Section


class Limits(Section):
    """Limits of one rule."""

    warn: float = Field(gt=0)
    """Value from which the rule warns."""
    stop: float | None = None
    """Value from which the guard acts; None only warns."""

    @model_validator(mode="after")
    def _in_order(self) -> "Limits":
        if self.stop is not None and self.stop < self.warn:
            raise ValueError(f"`stop` ({self.stop}) must not be below `warn` ({self.warn})")
        return self


class GuardConfig(Section):
    """Thresholds of the guard; every rule can be switched off with null.

    Gains are in standard deviations of base samples. The defaults were set on the embedded toy with 32 samples per
    iteration; on noise alone they stop fewer than one run of 500 iterations in a hundred (test_guard_rules.py).
    """

    action: Literal["none", "warn", "lower_reward", "stop", "roll_back"] = "warn"
    """Action of a rule over its `stop` limit; `roll_back` stops and keeps the best checkpoint by the judges."""
    images: int = Field(default=64, ge=1)
    """Most images per iteration whose content and diversity are measured; they are sent to the driver."""
    drift_timesteps: int = Field(default=4, ge=0)
    """Timesteps at which the drift of freshly updated weights is measured before they are published, on the images of
    one rollout chunk; 0 leaves drift to what the update itself measured, which is half an iteration behind."""
    smoothing: float = Field(default=0.3, gt=0, le=1)
    """Weight of the newest iteration in the running means that rules look at; 1 takes each iteration alone. Drift is
    always taken alone."""
    warmup: int = Field(default=5, ge=0)
    """First checks, during which running means settle and no rule but drift counts, unless grossly broken."""
    patience: int = Field(default=3, ge=1)
    """Consecutive checks over a limit before a rule rises; at most 2 for drift."""
    gross: float | None = Field(default=2.0, ge=1)
    """At so many times its `stop` limit in an iteration taken alone, a rule stops without patience or warm-up: drift,
    which hardly scatters, at the first such check, any other rule at the second in a row. None waits as ever."""
    release: float = Field(default=0.8, gt=0, le=1)
    """A rule is released once its value is under this share of its `warn` limit."""
    lower_factor: float = Field(default=0.5, gt=0, lt=1)
    """`lower_reward` multiplies the reward weight by this."""
    max_lowered: int = Field(default=3, ge=1)
    """Most lowerings of the reward weight; the next one stops the run."""
    cooldown: int = Field(default=10, ge=0)
    """Checks after a lowering during which no rule counts."""
    drift_budget: float | None = Field(default=None, gt=0)
    """Rms drift that the drift rule measures against; None takes the algorithm's own budget."""
    min_content_std: float = Field(default=0.05, gt=0, le=1)
    """Least unit of a content shift, as a share of the statistic's range: base samples may not vary in it at all."""
    hacking_gap: Limits | None = Limits(warn=0.6, stop=1.0)
    """Mean reward gain minus mean judge gain. Where the two correlate only by r, an honest gain g leaves (1 - r) g."""
    judge_below_base: Limits | None = Limits(warn=0.45, stop=0.6)
    """How far a judge is below the base model."""
    judge_fall: Limits | None = Limits(warn=0.6, stop=0.8)
    """How far a judge has fallen from the best that this run had."""
    diversity_lost: Limits | None = Limits(warn=0.4, stop=0.6)
    """Share of the base model's diversity that is gone."""
    content_shift: Limits | None = Limits(warn=1.0, stop=1.5)
    """Shift of a content statistic in base standard deviations, either way."""
    drift: Limits | None = Limits(warn=1.0, stop=1.2)
    """Rms drift as a multiple of its budget."""
