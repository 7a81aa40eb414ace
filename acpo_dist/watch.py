"""Holds the guard against a run: what it measures of each iteration, what it remembers, and how it says why."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from acpo_dist.config.schema import Config
from acpo_dist.core.ports import RolloutPool, Tracker
from acpo_dist.core.types import Normaliser, RolloutHandle, ScoreTable
from acpo_dist.evaluation.content import content_statistics
from acpo_dist.guard.guard import Decision, Guard
from acpo_dist.guard.signals import Reference, fit_reference, measure_signals
from acpo_dist.session import RunFolder
from acpo_dist.tracking.console import Console

logger = logging.getLogger(__name__)


class Watch:
    """Asked by the loop after each iteration. It sees judges, rewards, pictures and drift; never an oracle."""

    def __init__(
        self, config: Config, pool: RolloutPool, folder: RunFolder, tracker: Tracker, console: Console
    ) -> None:
        """Take the run's parts; `calibrate` or `restore` comes next."""
        self._config, self._pool, self._folder = config, pool, folder
        self._tracker, self._console = tracker, console
        self._guard = Guard(config.guard)
        self._reference: Reference | None = None
        self.decision: Decision | None = None
        """The last one."""

    @property
    def reward_scale(self) -> float:
        """What the guard has left of the reward weights."""
        return self._guard.reward_scale

    @property
    def best_iteration(self) -> int:
        """Saved checkpoint that the judges like best; 0 is the base model."""
        return self._guard.best_iteration

    def calibrate(self, handles: Sequence[RolloutHandle]) -> None:
        """Take the statistics of the base model's pictures as what is normal."""
        self._reference = fit_reference(
            self._content(handles), diversity=None, recall=None, min_std=self._config.guard.min_content_std
        )

    def check(
        self, iteration: int, handles: Sequence[RolloutHandle], scores: ScoreTable,
        normalisers: Mapping[str, Normaliser], *, drift_rms: float,
    ) -> Decision:  # fmt: skip
        """Decide on one iteration, and say and record what has risen.

        Args:
            iteration: the one just done, counted from 0.
            drift_rms: in the anchor's own units, which are the budget's too.
        """
        assert self._reference is not None, "calibrate or restore first"
        rewards, anchor = self._config.rewards, getattr(self._config.algorithm, "anchor", None)
        budget = self._config.guard.drift_budget or (anchor.budget if anchor is not None else None)
        signals = measure_signals(
            train=[entry.name for entry in rewards.train], judges=[entry.name for entry in rewards.judges],
            scores=scores, normalisers=normalisers, content=self._content(handles), reference=self._reference,
            drift_rms=drift_rms, drift_budget=budget,
        )  # fmt: skip
        decision = self.decision = self._guard.update(iteration, signals)
        for name in decision.raised:
            text = next(reason.text for reason in decision.reasons if reason.rule == name)
            self._console.message(f"guard, iteration {iteration + 1}: {text}")
        if decision.action == "lower_reward":
            self._console.message(f"guard: reward weights are at {decision.reward_scale:g} of what was set from now on")
        if decision.raised or decision.action in ("lower_reward", "stop", "roll_back"):
            self._record(decision)
        return decision

    def saved(self, iteration: int, judge_gains: Mapping[str, float] | None = None) -> None:
        """A checkpoint of this iteration is there to roll back to; see `Guard.saved`."""
        self._guard.saved(iteration, judge_gains)

    def to_mapping(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        reference = self._reference.to_mapping() if self._reference else None
        return {"guard": {"state": self._guard.state(), "reference": reference}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._guard = Guard.restore(self._config.guard, state["guard"]["state"])
        self._reference = Reference(**state["guard"]["reference"])

    def _record(self, decision: Decision) -> None:
        with self._folder.guard.open("a", encoding="utf-8") as file:
            file.write(json.dumps(decision.to_mapping()) + "\n")
        self._tracker.set_tags({"guard": decision.action, "guard_reason": decision.text[:400]})

    def _content(self, handles: Sequence[RolloutHandle]) -> dict[str, list[float]]:
        """Statistics of the first pictures of each chunk, `guard.pictures` in all."""
        ids = [sample_id for handle in handles for sample_id in handle.sample_ids][: self._config.guard.pictures]
        return {name: values.tolist() for name, values in content_statistics(self._pool.images(handles, ids)).items()}
