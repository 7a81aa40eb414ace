"""Connects the guard to a run: measures the signals of each iteration, and reports and saves the decisions."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from torch import Tensor

from acpo_dist.config.schema import Config
from acpo_dist.core.by_size import Mixed
from acpo_dist.core.ports import LearnerGroup, RolloutPool, Tracker
from acpo_dist.core.types import Normaliser, RolloutHandle, ScoreTable
from acpo_dist.evaluation.metrics.content import content_statistics
from acpo_dist.evaluation.metrics.spread import SpreadGauge, fit_gauge
from acpo_dist.tracking.console import Console
from acpo_dist.training.guard.guard import Decision, Guard
from acpo_dist.training.guard.signals import Reference, fit_reference, measure_signals
from acpo_dist.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


class GuardMonitor:
    """Measures judges, rewards, images and drift after each iteration and passes them to the guard."""

    def __init__(
        self, config: Config, pool: RolloutPool, folder: RunFolder, tracker: Tracker, console: Console
    ) -> None:
        """Store the run's parts; call `calibrate` or `restore` next."""
        self._config, self._pool, self._folder = config, pool, folder
        self._tracker, self._console = tracker, console
        self._guard = Guard(config.guard)
        self._reference: Reference | None = None
        self._gauge: SpreadGauge | None = None
        self._levels: Tensor | None = None
        self.decision: Decision | None = None
        """The decision of the last check."""

    @property
    def reward_scale(self) -> float:
        """Factor that the guard applies to the reward weights."""
        return self._guard.reward_scale

    @property
    def best_iteration(self) -> int:
        """Iteration of the best saved checkpoint by the judges; 0 is the base model."""
        return self._guard.best_iteration

    def calibrate(self, handles: Sequence[RolloutHandle]) -> None:
        """Set the reference statistics from images of the base model."""
        images, prompts = self._images(handles)
        rollout = self._config.rollout
        self._gauge = fit_gauge(
            images, prompts, samples_per_prompt=rollout.samples_per_prompt,
            per_iteration=min(self._config.guard.images, rollout.prompts_per_iteration * rollout.samples_per_prompt),
        )  # fmt: skip
        self._reference = fit_reference(
            _content(images), diversity=self._gauge.measure(images, prompts) if self._gauge else None,
            min_std=self._config.guard.min_content_std,
        )  # fmt: skip

    def probe(self, learner: LearnerGroup, handles: Sequence[RolloutHandle]) -> dict[int, float]:
        """Measure drift of the learner's updated weights before they are published, on the images of one chunk.

        Returns:
            timestep -> mean squared drift in the anchor's own units, on forward-noised images; empty if
            `guard.drift_timesteps` is 0.
        """
        count = self._config.guard.drift_timesteps
        if not count:
            return {}
        if self._levels is None:
            self._levels = self._pool.alpha_bars()
        total = len(self._levels)
        timesteps = [total * (2 * index + 1) // (2 * count) for index in range(count)]
        return learner.measure_drift(handles[:1], timesteps, space=getattr(self._anchor, "space", "auto"))

    def check(
        self, iteration: int, handles: Sequence[RolloutHandle], scores: ScoreTable,
        normalisers: Mapping[str, Normaliser], *, drift_rms: float, probe: Mapping[int, float],
    ) -> Decision:  # fmt: skip
        """Decide on one iteration, and report and record the rules that rose.

        Args:
            iteration: index of the finished iteration, from 0.
            drift_rms: rms drift during the update, in the units of the anchor and of its budget.
            probe: result of `probe` for the updated weights; the larger of the two is used.
        """
        assert self._reference is not None, "calibrate or restore first"
        rewards, (images, prompts) = self._config.rewards, self._images(handles)
        budget = self._config.guard.drift_budget or getattr(self._anchor, "budget", None)
        signals = measure_signals(
            train=[entry.name for entry in rewards.train], judges=[entry.name for entry in rewards.judges],
            scores=scores, normalisers=normalisers, content=_content(images), reference=self._reference,
            diversity=self._gauge.measure(images, prompts) if self._gauge else None,
            drift_rms=max(drift_rms, probe_rms(probe)), drift_budget=budget,
        )  # fmt: skip
        decision = self.decision = self._guard.update(iteration, signals)
        for name in decision.raised:
            text = next(reason.text for reason in decision.reasons if reason.rule == name)
            self._console.message(f"guard, iteration {iteration + 1}: {text}")
        if decision.action == "lower_reward":
            self._console.message(
                f"guard: reward weights are multiplied by {decision.reward_scale:g} from the next iteration on"
            )
        if decision.raised or decision.action in ("lower_reward", "stop", "roll_back"):
            self._record(decision)
        return decision

    def saved(self, iteration: int, judge_gains: Mapping[str, float] | None = None) -> None:
        """Consider a saved checkpoint for a roll-back; see `Guard.saved`."""
        self._guard.saved(iteration, judge_gains)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        reference = self._reference.to_mapping() if self._reference else None
        gauge = asdict(self._gauge) if self._gauge else None
        ended = self.decision.to_mapping() if self.decision and self.decision.ends else None
        return {
            "guard": {
                "state": self._guard.state(), "reference": reference, "gauge": gauge, "ended": ended,
                "config": self._config.guard.model_dump(mode="json"),
            }
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._guard = Guard.restore(self._config.guard, state["guard"]["state"])
        reference = dict(state["guard"]["reference"])
        reference.pop("recall", None)  # written by versions that had the rule `recall_lost`
        self._reference = Reference(**reference)
        gauge = state["guard"].get("gauge")
        self._gauge = SpreadGauge(**gauge) if gauge else None

    def _record(self, decision: Decision) -> None:
        with self._folder.guard.open("a", encoding="utf-8") as file:
            file.write(json.dumps(decision.to_mapping()) + "\n")
        self._tracker.set_tags({"guard": decision.action, "guard_reason": decision.text[:400]})

    @property
    def _anchor(self) -> Any:
        return getattr(self._config.algorithm, "anchor", None)

    def _images(self, handles: Sequence[RolloutHandle]) -> tuple[Mixed, list[str]]:
        """Return the first `guard.images` images with their prompts."""
        found = [pair for handle in handles for pair in zip(handle.sample_ids, handle.prompts, strict=True)]
        found = found[: self._config.guard.images]
        return self._pool.images(handles, [sample_id for sample_id, _ in found]), [prompt for _, prompt in found]


def ending_of(config: Config, state: Mapping[str, Any]) -> Decision | None:
    """Return the decision that ended the run with this checkpoint, or None.

    None also if the guard's configuration has changed since: with other limits or another action the run may continue.
    """
    ended = state["guard"].get("ended")
    if not ended or state["guard"]["config"] != config.guard.model_dump(mode="json"):
        return None
    return Decision.from_mapping(ended)


def probe_rms(probe: Mapping[int, float]) -> float:
    """Return the root mean square over timesteps; 0 if `probe` is empty."""
    return fmean(probe.values()) ** 0.5 if probe else 0.0


def _content(images: Mixed) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in content_statistics(images).items()}
