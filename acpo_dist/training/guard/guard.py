"""The guard: from each iteration's signals to a decision, resumable to the bit."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from acpo_dist.config.guard import GuardConfig, Limits
from acpo_dist.training.guard.decision import WORDING, Action, Decision, Reason
from acpo_dist.training.guard.rules import RuleState, RunningMean, step, step_gross
from acpo_dist.training.guard.signals import Signals


class Guard:
    """Keeps running means of the signals, holds every rule against them and remembers the best checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        """Start with nothing seen."""
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
        """What `lower_reward` has left of the reward weights."""
        return self._config.lower_factor**self._lowered

    @property
    def best_iteration(self) -> int:
        """Iteration of the best saved checkpoint by the judges; 0, the base model, until one is at least as good."""
        return self._best[0]

    def update(self, iteration: int, signals: Signals) -> Decision:
        """Take in one iteration's signals and decide.

        Args:
            iteration: higher than at the last call; iterations may be left out.

        Raises:
            ValueError: an iteration seen before, or a figure that is not finite.
        """
        if iteration <= self._iteration:
            raise ValueError(f"the guard has seen iteration {self._iteration} already, and was given {iteration}")
        now = signals.flat()
        self._iteration = iteration
        self._checks += 1
        for name, value in now.items():
            self._means[name] = self._means.get(name, RunningMean()).add(value, self._config.smoothing)
        # Drift hardly scatters and may run away within two iterations: it is taken as it is.
        smoothed = {name: self._means[name].value if name != "drift" else value for name, value in now.items()}
        if self._checks > self._config.warmup:
            for name, value in smoothed.items():
                if name.startswith("judge/"):
                    self._best_judges[name] = max(value, self._best_judges.get(name, value))
        metrics, alone = self._metrics(smoothed), self._metrics(now)
        raised = self._hold(metrics, alone)
        # What stopped a rule at once is said, not the mean that lags behind it.
        metrics |= {name: alone[name] for name in alone if self._is_gross(name)}
        # Reasons first: a lowering makes the rules begin anew.
        reasons = self._reasons(metrics)
        action = self._act()
        return Decision(
            iteration=iteration, action=action, reasons=reasons, raised=raised, metrics=metrics,
            stop_shares={name: value / _line(self._limit(name)) for name, value in metrics.items()},
            reward_scale=self.reward_scale, best_iteration=self.best_iteration,
        )  # fmt: skip

    def saved(self, iteration: int, judge_gains: Mapping[str, float] | None = None) -> None:
        """A checkpoint of this iteration was saved: it becomes the best if no judge is worse off than at the old best.

        The worst judge counts; the base model's gain is 0. Without judges the newest is the best. Nothing is taken
        while a rule stands at `stop`.

        Args:
            judge_gains: measured with the saved weights, best on the calibration prompts and seeds, where the base
                model's gain is exactly 0; None takes the running means, which lag behind by some iterations.
        """
        if any(state.level == "stop" for state in self._rules.values()):
            return
        running = {name[6:]: mean.value for name, mean in self._means.items() if name.startswith("judge/")}
        score = min((running if judge_gains is None else judge_gains).values(), default=0.0)
        if score >= self._best[1]:
            self._best = (iteration, score)

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs, as plain data: floats survive the round trip through JSON exactly."""
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
        """Go on from what `state` gave, under the same configuration."""
        guard = cls(config)
        guard._iteration, guard._checks = int(state["iteration"]), int(state["checks"])
        guard._means = {name: RunningMean(**mean) for name, mean in state["means"].items()}
        guard._best_judges = dict(state["best_judges"])
        known = state["rules"].items()
        # A rule may have been switched off since.
        guard._rules = {name: RuleState(**rule) for name, rule in known if guard._limits[_kind(name)] is not None}
        guard._quiet_until, guard._lowered = int(state["quiet_until"]), int(state["lowered"])
        guard._best = (int(state["best"][0]), float(state["best"][1]))
        return guard

    def _limit(self, rule: str) -> Limits:
        limits = self._limits[_kind(rule)]
        assert limits is not None
        return limits

    def _counts(self, rule: str) -> bool:
        """Drift counts from the first check on: it is measured on every trained state and hardly scatters."""
        return rule == "drift" or self._checks > self._config.warmup

    def _is_gross(self, rule: str) -> bool:
        state = self._rules.get(rule)
        return state is not None and state.over_gross >= _gross_patience(rule)

    def _metrics(self, smoothed: Mapping[str, float]) -> dict[str, float]:
        """Figures of the rules that are switched on, higher is worse."""
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
        for name in ("diversity", "recall"):
            if name in smoothed:
                metrics[f"{name}_lost"] = 1 - smoothed[name]
        if "drift" in smoothed:
            metrics["drift"] = smoothed["drift"]
        return {name: value for name, value in metrics.items() if self._limits[_kind(name)] is not None}

    def _hold(self, metrics: Mapping[str, float], alone: Mapping[str, float]) -> tuple[str, ...]:
        """Check every rule, on its running mean and on this iteration alone; return those that rose."""
        if self._checks <= self._quiet_until:
            return ()
        config, raised = self._config, []
        for name, figure in metrics.items():
            before = after = self._rules.get(name, RuleState())
            limits = self._limit(name)
            if self._counts(name):
                patience = min(config.patience, _DRIFT_PATIENCE) if name == "drift" else config.patience
                after = step(after, figure, limits, patience=patience, release=config.release)
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
        # A weaker reward needs time to show: rules begin anew after the cooldown.
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
"""Checks over a limit in a row: a controller that steers drift may overshoot once."""


def _gross_patience(rule: str) -> int:
    """Means of one iteration's samples scatter, so that one of them alone proves nothing."""
    return 1 if rule == "drift" else 2


_RANK: dict[str, int] = {"ok": 0, "warn": 1, "stop": 2}


def _kind(rule: str) -> str:
    return rule.partition("/")[0]


def _line(limits: Limits) -> float:
    return limits.stop if limits.stop is not None else limits.warn
