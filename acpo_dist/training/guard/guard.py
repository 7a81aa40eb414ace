"""The guard converts each iteration's signals to a decision; a resumed guard decides identically, bit for bit."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from acpo_dist.config.guard import GuardConfig, Limits
from acpo_dist.training.guard.decision import WORDING, Action, Decision, Reason
from acpo_dist.training.guard.rules import RuleState, RunningMean, step, step_gross
from acpo_dist.training.guard.signals import Signals


class Guard:
    """Updates running means of the signals, checks every rule on them, and tracks the best checkpoint by the judges."""

    def __init__(self, config: GuardConfig) -> None:
        """Start without any observed iteration."""
        self._config = config
        self._limits: dict[str, Limits | None] = {kind: getattr(config, kind) for kind in WORDING}
        self._iteration = -1
        self._checks = 0
        self._means: dict[str, RunningMean] = {}
        self._best_judges: dict[str, float] = {}
        self._rules: dict[str, RuleState] = {}
        self._quiet_until = 0
        self._lowered = 0
        self._best = (0, 0.0)

    @property
    def reward_scale(self) -> float:
        """Product of all `lower_reward` actions so far; multiplies every reward weight."""
        return self._config.lower_factor**self._lowered

    @property
    def best_iteration(self) -> int:
        """Iteration of the best saved checkpoint by the judges; 0, the base model, until one is at least as good."""
        return self._best[0]

    def update(self, iteration: int, signals: Signals) -> Decision:
        """Update with one iteration's signals and decide.

        Args:
            iteration: higher than at the last call; iterations may be left out.

        Raises:
            ValueError: an iteration seen before, or a signal that is not finite.
        """
        if iteration <= self._iteration:
            raise ValueError(f"the guard has already checked iteration {self._iteration}, and was given {iteration}")
        now = signals.flat()
        self._iteration = iteration
        self._checks += 1
        for name, value in now.items():
            self._means[name] = self._means.get(name, RunningMean()).add(value, self._config.smoothing)
        # Drift has little noise and can diverge within two iterations: it is not smoothed.
        smoothed = {name: self._means[name].value if name != "drift" else value for name, value in now.items()}
        if self._checks > self._config.warmup:
            for name, value in smoothed.items():
                if name.startswith("judge/"):
                    self._best_judges[name] = max(value, self._best_judges.get(name, value))
        metrics, alone = self._metrics(smoothed), self._metrics(now)
        raised = self._hold(metrics, alone)
        # A rule that stopped on one iteration reports that value, not the mean that lags behind it.
        metrics |= {name: alone[name] for name in alone if self._is_gross(name)}
        # Before the action: `lower_reward` resets the rules.
        reasons = self._reasons(metrics)
        action = self._act()
        return Decision(
            iteration=iteration, action=action, reasons=reasons, raised=raised, metrics=metrics,
            stop_shares={name: value / _line(self._limit(name)) for name, value in metrics.items()},
            reward_scale=self.reward_scale, best_iteration=self.best_iteration,
        )  # fmt: skip

    def saved(self, iteration: int, judge_gains: Mapping[str, float] | None = None) -> None:
        """Consider the saved checkpoint of this iteration: it becomes the best if its worst judge is at least as good.

        The base model's gain is 0. Without judges the newest checkpoint is the best. No checkpoint is considered while
        a rule is at `stop`.

        Args:
            judge_gains: measured with the saved weights, best on the calibration prompts and seeds, where the base
                model's gain is exactly 0; None uses the running means, which lag behind by some iterations.
        """
        if any(state.level == "stop" for state in self._rules.values()):
            return
        running = {name[6:]: mean.value for name, mean in self._means.items() if name.startswith("judge/")}
        score = min((running if judge_gains is None else judge_gains).values(), default=0.0)
        if score >= self._best[1]:
            self._best = (iteration, score)

    def state(self) -> dict[str, Any]:
        """Return the complete state as plain data for a checkpoint; floats survive JSON exactly."""
        return {
            "iteration": self._iteration,
            "checks": self._checks,
            "means": {name: asdict(mean) for name, mean in self._means.items()},
            "best_judges": dict(self._best_judges),
            "rules": {name: rule.to_mapping() for name, rule in self._rules.items()},
            "quiet_until": self._quiet_until,
            "lowered": self._lowered,
            "best": list(self._best),
        }

    @classmethod
    def restore(cls, config: GuardConfig, state: Mapping[str, Any]) -> "Guard":
        """Rebuild a guard from the result of `state` under the same configuration."""
        guard = cls(config)
        guard._iteration, guard._checks = int(state["iteration"]), int(state["checks"])
        guard._means = {name: RunningMean(**mean) for name, mean in state["means"].items()}
        guard._best_judges = dict(state["best_judges"])
        known = state["rules"].items()
        # A rule may have been switched off in the meantime.
        guard._rules = {name: RuleState(**rule) for name, rule in known if guard._limits[_kind(name)] is not None}
        guard._quiet_until, guard._lowered = int(state["quiet_until"]), int(state["lowered"])
        guard._best = (int(state["best"][0]), float(state["best"][1]))
        return guard

    def _limit(self, rule: str) -> Limits:
        limits = self._limits[_kind(rule)]
        assert limits is not None
        return limits

    def _counts(self, rule: str) -> bool:
        """Drift is checked from the first iteration on: it is measured on every trained state and has little noise."""
        return rule == "drift" or self._checks > self._config.warmup

    def _is_gross(self, rule: str) -> bool:
        state = self._rules.get(rule)
        return state is not None and state.over_gross >= _gross_patience(rule)

    def _metrics(self, smoothed: Mapping[str, float]) -> dict[str, float]:
        """Return the value of every enabled rule, higher is worse."""
        rewards = [value for name, value in smoothed.items() if name.startswith("reward/")]
        judges = {name: value for name, value in smoothed.items() if name.startswith("judge/")}
        metrics: dict[str, float] = {}
        if rewards and judges:
            metrics["hacking_gap"] = sum(rewards) / len(rewards) - sum(judges.values()) / len(judges)
        for name, value in judges.items():
            metrics[f"judge_below_base/{name[6:]}"] = -value
            metrics[f"judge_fall/{name[6:]}"] = self._best_judges.get(name, value) - value
        for name, value in smoothed.items():
            if name.startswith("content/"):
                metrics[f"content_shift/{name[8:]}"] = abs(value)
        if "diversity" in smoothed:
            metrics["diversity_lost"] = 1 - smoothed["diversity"]
        if "drift" in smoothed:
            metrics["drift"] = smoothed["drift"]
        return {name: value for name, value in metrics.items() if self._limits[_kind(name)] is not None}

    def _hold(self, metrics: Mapping[str, float], alone: Mapping[str, float]) -> tuple[str, ...]:
        """Check every rule on its running mean and on this iteration alone; return the rules that rose."""
        if self._checks <= self._quiet_until:
            return ()
        config, raised = self._config, []
        for name, value in metrics.items():
            before = after = self._rules.get(name, RuleState())
            limits = self._limit(name)
            if self._counts(name):
                patience = min(config.patience, _DRIFT_PATIENCE) if name == "drift" else config.patience
                after = step(after, value, limits, patience=patience, release=config.release)
            if limits.stop is not None and config.gross is not None:
                after = step_gross(after, alone[name], config.gross * limits.stop, patience=_gross_patience(name))
            self._rules[name] = after
            if _RANK[after.level] > _RANK[before.level]:
                raised.append(name)
        return tuple(raised)

    def _act(self) -> Action:
        levels = {state.level for state in self._rules.values()}
        chosen = self._config.action
        if chosen == "none" or levels <= {"ok"}:
            return "none"
        if "stop" not in levels or chosen == "warn":
            return "warn"
        if chosen != "lower_reward":
            return chosen
        if self._lowered == self._config.max_lowered:
            return "stop"
        self._lowered += 1
        # A lower reward weight takes effect slowly: the rules restart after the cooldown.
        self._rules = {}
        self._quiet_until = self._checks + self._config.cooldown
        return "lower_reward"

    def _reasons(self, metrics: Mapping[str, float]) -> tuple[Reason, ...]:
        found = []
        for name, state in self._rules.items():
            if state.level != "ok" and name in metrics:
                warn, stop = self._limit(name).warn, self._limit(name).stop
                found.append(Reason(rule=name, level=state.level, value=metrics[name], warn=warn, stop=stop))
        return tuple(sorted(found, key=lambda reason: -_RANK[reason.level]))


_DRIFT_PATIENCE = 2
"""Return the required consecutive checks over a limit; the drift controller may overshoot once."""


def _gross_patience(rule: str) -> int:
    """Means over one iteration are noisy, so rules other than drift need two of them."""
    return 1 if rule == "drift" else 2


_RANK: dict[str, int] = {"ok": 0, "warn": 1, "stop": 2}


def _kind(rule: str) -> str:
    return rule.partition("/")[0]


def _line(limits: Limits) -> float:
    return limits.stop if limits.stop is not None else limits.warn
