"""Thresholds and actions of the guard against reward hacking."""

from typing import Literal

from pydantic import Field, model_validator

from acpo_dist.config.section import Section


class Limits(Section):
    """Limits of one rule."""

    warn: float = Field(gt=0)
    """Value from which the rule warns."""
    stop: float | None = None
    """Value from which the guard acts; None: warn only."""

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
    """Action if a rule exceeds its `stop` limit; `roll_back` stops and keeps the best checkpoint by the judges."""
    images: int = Field(default=64, ge=1)
    """Largest number of images per iteration whose content and diversity are measured on the driver."""
    drift_timesteps: int = Field(default=4, ge=0)
    """Number of timesteps at which the drift of updated weights is measured before they are published, on the images of
    one rollout chunk; 0 uses the drift measured during the update, which lags by half an iteration."""
    smoothing: float = Field(default=0.3, gt=0, le=1)
    """Weight of the newest iteration in the running means of the rules; drift uses each iteration alone."""
    warmup: int = Field(default=5, ge=0)
    """First checks, during which running means settle; only drift and values over `gross` count."""
    patience: int = Field(default=3, ge=1)
    """Consecutive checks over a limit before a rule changes its level; at most 2 for drift."""
    gross: float | None = Field(default=2.0, ge=1)
    """Factor over the `stop` limit, in a single iteration, at which a rule stops without patience or warm-up: drift,
    which has little noise, at the first such check, other rules at the second consecutive one. None disables this."""
    release: float = Field(default=0.8, gt=0, le=1)
    """Share of the `warn` limit below which a rule is released."""
    lower_factor: float = Field(default=0.5, gt=0, lt=1)
    """Factor on the reward weight for `lower_reward`."""
    max_lowered: int = Field(default=3, ge=1)
    """Largest number of reductions of the reward weight; the next one stops the run."""
    cooldown: int = Field(default=10, ge=0)
    """Checks after a reduction during which no rule counts."""
    drift_budget: float | None = Field(default=None, gt=0)
    """Rms drift to which the drift rule is relative; None uses the algorithm's budget."""
    min_content_std: float = Field(default=0.05, gt=0, le=1)
    """Lower bound of the unit of a content shift, as a share of the statistic's range; base samples may not vary at
    all."""
    hacking_gap: Limits | None = Limits(warn=0.6, stop=1.0)
    """Mean reward gain minus mean judge gain. If their correlation is r, an honest gain g leaves (1 - r) g."""
    judge_below_base: Limits | None = Limits(warn=0.45, stop=0.6)
    """Distance of a judge below the base model."""
    judge_fall: Limits | None = Limits(warn=0.6, stop=0.8)
    """Fall of a judge from its best value in this run."""
    diversity_lost: Limits | None = Limits(warn=0.4, stop=0.6)
    """Lost share of the base model's diversity."""
    content_shift: Limits | None = Limits(warn=1.0, stop=1.5)
    """Shift of a content statistic in base standard deviations, in either direction."""
    drift: Limits | None = Limits(warn=1.0, stop=1.2)
    """Rms drift as a multiple of its budget."""
