"""The training iteration, written on the ports: the same code runs in one process and on a Ray cluster.

sample prompts -> generate rollouts -> score -> update on gradients from the reward pool -> publish weights -> record.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acpo_dist.algorithms.base import Algorithm
from acpo_dist.core.clock import PhaseClock, RoleClock
from acpo_dist.core.errors import NonFiniteError
from acpo_dist.core.registry import ALGORITHMS, resolve
from acpo_dist.core.types import (
    RolloutHandle,
    ScoredGroups,
    Selection,
    TrainReport,
    TrainTask,
)
from acpo_dist.tracking.images import save_grid
from acpo_dist.training.calibration import calibrate, measure_gain, names_of, resume, reward_terms
from acpo_dist.training.context import RunContext, fixed_groups
from acpo_dist.training.guard.guard import Decision
from acpo_dist.training.guard.monitor import GuardMonitor
from acpo_dist.training.iteration_metrics import drift_of, score_metrics
from acpo_dist.training.samples import ScoredSamples, groups_of, open_samples
from acpo_dist.training.trajectory.manager import TrajectoryManager
from acpo_dist.workers.learner.checkpoint import LEARNER, Checkpoint
from acpo_dist.workers.learner.rates import learning_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """How the run ended."""

    iterations: int
    version: int
    last_metrics: dict[str, float]
    guard: Decision | None
    """The decision with which the guard ended the run early, or None."""


class Trainer:
    """Runs iterations from a fresh start or a checkpoint up to `run.iterations`."""

    def __init__(self, context: RunContext, checkpoint: Checkpoint | None = None) -> None:
        """Start the learner, set the trajectory, and calibrate on base samples or restore the checkpoint.

        Args:
            checkpoint: state to continue from; None starts at iteration 0.
        """
        config, ports, folder = context.config, context.ports, context.folder
        self._context, self._config, self._ports, self._folder = context, config, ports, folder
        self._prompts, self._console = context.prompts, context.console
        self._roles = RoleClock()
        self._samples = open_samples(context, self._roles)
        ports.learner.start(checkpoint.learner_folder if checkpoint else None)
        self._trajectory = TrajectoryManager(
            config, ports.rollout, folder, ports.tracker, context.prompts, context.console
        )
        self._pending: dict[str, float] = {}
        """Metrics that belong to the next recorded iteration."""
        if checkpoint:
            self._trajectory.restore(checkpoint.state)
        else:
            self._pending = self._trajectory.start()
        self._algorithm: Algorithm = resolve("algorithm", ALGORITHMS, config.algorithm.type)(config.algorithm)
        self._guard = GuardMonitor(config, ports.rollout, folder, ports.tracker, context.console)
        if checkpoint:
            self._state = resume(config, checkpoint)
            self._guard.restore(checkpoint.state)
            self._samples.restore(checkpoint.state)
            self._pending = dict(checkpoint.state.get("pending", {}))
        else:
            self._state = calibrate(context, self._algorithm, self._guard)
            if config.guard.action == "roll_back":
                self.save_checkpoint()
            else:
                self.keep_state()
        ports.weights.publish(self._state.version)

    def close(self) -> None:
        """Stop drawing samples ahead."""
        self._samples.close()

    def fit(self) -> LoopResult:
        """Run the remaining iterations, record each, and measure the gain of the final weights."""
        config, state, metrics = self._config, self._state, dict[str, float]()
        while state.iteration < config.run.iterations:
            metrics = self.iterate() | self._pending
            done = state.iteration
            # After the update and before the next rollouts: a trajectory never changes within an iteration.
            metrics, self._pending = metrics | self._trajectory.after(done), {}
            self._folder.require_ours()
            self._ports.tracker.log_metrics(done - 1, metrics)
            ended = self._ended
            self._console.iteration(done, config.run.iterations, metrics, last=ended is not None)
            last = done == config.run.iterations or ended is not None
            # After a roll-back the workers do not hold this iteration's weights.
            rolled_back = ended is not None and ended.action == "roll_back"
            if (done % config.tracking.images_every == 0 or last) and not rolled_back:
                self.save_samples()
            if done % config.checkpoint.every == 0 or last:
                self.save_checkpoint()
            else:
                self.keep_state()
            if ended:
                break
        # Recorded one past the last iteration: a longer run that resumes from here drops this row.
        gain = measure_gain(self._context, state)
        self._folder.require_ours()
        self._ports.tracker.log_metrics(state.iteration, gain)
        text = ", ".join(f"{name[5:]} {value:+.2f}" for name, value in gain.items())
        self._console.message(f"gain in base standard deviations: {text}")
        return LoopResult(
            iterations=state.iteration, version=state.version, last_metrics=metrics | gain, guard=self._ended
        )

    def iterate(self) -> dict[str, float]:
        """Run one rollout, reward, update and sync cycle, and return its metrics.

        Training on pairs of a data set needs no rollouts: judges and guard get them every `rollout.every` iterations.
        """
        config, ports, state = self._config, self._ports, self._state
        clock = PhaseClock()
        if self._needs_rollouts:
            samples = self._samples.take(state.iteration, state.version, clock)
        else:
            groups = groups_of(self._context, state.iteration)
            samples = ScoredSamples(groups=groups, handles=(), scores={}, version=state.version)
        handles, scores = samples.handles, samples.scores
        selection = self._select(samples)
        task = self._task(selection, samples.version)
        with clock.phase("learn"), self._roles.busy("learner"):
            with self._console.phase("learn", len(task.sample_ids)) as advance:
                report = ports.learner.train(handles, task, advance)
        with clock.phase("probe"), self._roles.busy("learner"):
            probe = self._guard.probe(ports.learner, handles) if handles else {}
        self._folder.require_ours()
        if report.skipped:
            self._record_skipped(report, handles)
        moved = report.optim_steps > 0
        drift = drift_of(config, report.metrics) if moved else state.drift
        metrics = {
            **(score_metrics(config, scores, state.normalisers) if handles else {}),
            **report.metrics,
            **selection.metrics,
            "anchor/weight": state.controller.weight,
            "learner/learning_rate": task.learning_rate,
            "learner/skipped_steps": float(len(report.skipped)),
            "drift/rms": drift**0.5,
            **{f"drift/at/{timestep}": value for timestep, value in probe.items()},
            **ports.reward.counters(),
        }
        if config.pipeline.max_staleness:
            metrics["pipeline/staleness"] = float(task.staleness)
        if state.controller.budget is not None:
            metrics["drift/budget"] = state.controller.budget
        if handles:
            with clock.phase("guard"):
                decision = self._guard.check(
                    state.iteration, handles, scores, state.normalisers, drift_rms=drift**0.5, probe=probe
                )
            metrics |= decision.to_metrics()
        # Rolled-back weights are never published: the workers keep the weights of the iteration before.
        if self._ended is None or self._ended.action != "roll_back":
            with clock.phase("sync"), self._roles.busy("learner"):
                ports.weights.publish(state.version + 1)
            state.version += 1
        else:
            # Drawn with weights that followed the ones that the run returns to.
            self._samples.discard()
        if moved:
            state.controller, state.drift = state.controller.update(drift), drift
        state.iteration += 1
        waited_s = report.metrics.get("time/reward_gradient", 0.0)
        metrics |= self._samples.metrics() | {"sync/version": float(state.version)}
        return metrics | clock.metrics(self._roles, waited_s)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the present iteration; an incomplete one is removed if writing fails."""
        config, state, folder = self._config, self._state, self._folder
        folder.require_ours()
        partial = folder.checkpoints.prepare(state.iteration)
        try:
            flying = self._samples.to_mapping()
            self._ports.learner.save(partial / LEARNER, _versions(flying))
            # The judges score the saved weights themselves: running means lag behind them by some iterations.
            exact = config.guard.action == "roll_back" and config.rewards.judges and state.iteration > 0
            gains = measure_gain(self._context, state) if exact and not self._ended else {}
            judges = {name: gains[f"gain/{name}"] for name in names_of(config.rewards.judges)} if gains else None
            self._guard.saved(state.iteration, judges)
            mapping = self._mapping(flying)
            folder.require_ours()
            path = folder.checkpoints.commit(partial, state.iteration, mapping, protect=self._guard.best_iteration)
        except BaseException:
            # Also on Ctrl-C: an incomplete checkpoint only takes space, which a full disk may need.
            folder.checkpoints.discard(partial)
            raise
        self._ports.tracker.set_tags({"checkpoint": str(path), "checkpoint_iteration": state.iteration})
        logger.info("checkpoint %s", path)
        self._context.kept.clear()

    def keep_state(self) -> None:
        """Copy the state of a checkpoint to memory that outlives the learner's ranks, where the learner can do that."""
        flying = self._samples.to_mapping()
        learner = self._ports.learner.keep(_versions(flying))
        if learner is not None:
            self._context.kept.add(self._state.iteration, learner, self._mapping(flying))

    def _mapping(self, flying: Mapping[str, Any]) -> dict[str, Any]:
        """Return the driver's part of a checkpoint's state."""
        parts = (self._state, self._trajectory, self._guard)
        return {key: value for part in parts for key, value in part.to_mapping().items()} | {
            **flying, "pending": self._pending,
        }  # fmt: skip

    def save_samples(self) -> None:
        """Write and record a grid of images from the same prompts and seeds at every call."""
        groups = fixed_groups(self._config, self._prompts, self._config.tracking.num_images, stream="grid")
        handles = self._ports.rollout.generate(groups)
        ids = [plan.sample_id for group in groups for plan in group.samples]
        path = self._folder.samples / f"{self._state.iteration:06d}.png"
        save_grid(self._ports.rollout.images(handles, ids), path, columns=min(8, len(ids)))
        self._ports.tracker.log_image("samples", self._state.iteration, path)

    @property
    def _needs_rollouts(self) -> bool:
        config, iteration = self._config, self._state.iteration
        last = iteration == config.run.iterations - 1
        return self._ports.pairs is None or iteration % config.rollout.every == 0 or last

    @property
    def _ended(self) -> Decision | None:
        """Return the guard's last decision if it ends the run."""
        decision = self._guard.decision
        return decision if decision is not None and decision.ends else None

    def _select(self, samples: ScoredSamples) -> Selection:
        """Return the samples to train on: rollouts selected by the algorithm, or pairs of `data.pairs`."""
        config, ports, state = self._config, self._ports, self._state
        groups, handles, scores = samples.groups, samples.handles, samples.scores
        if ports.pairs is not None:
            count = config.rollout.prompts_per_iteration * config.rollout.samples_per_prompt // 2
            ids = ports.pairs.sample_pairs(iteration=state.iteration, count=count, run_seed=config.run.seed)
            metrics = {f"pairs/{name}": float(value) for name, value in ports.pairs.counts.items()}
            return Selection(sample_ids=tuple(ids), weights=dict.fromkeys(ids, 1.0), metrics=metrics)
        ids = [plan.sample_id for group in groups for plan in group.samples]
        qualities = {
            name: {key: state.normalisers[name].reward(scores[name][key]) for key in ids}
            for name in names_of(config.rewards.train)
        }
        return self._algorithm.select(
            ScoredGroups(
                groups=tuple(groups), qualities=qualities, weights=config.rewards.term_weights(),
                spread=config.rewards.spread,
                images=lambda: dict(zip(ids, ports.rollout.images(handles, ids), strict=True)),
            )
        )  # fmt: skip

    def _task(self, selection: Selection, drawn_version: int) -> TrainTask:
        config, state, scale = self._config, self._state, self._guard.reward_scale
        weights = selection.weights
        if not config.algorithm.pathwise:
            # A pathwise objective is scaled by its reward terms; one that uses scores only, by its sample weights.
            weights = {name: scale * weight for name, weight in weights.items()}
        return TrainTask(
            iteration=state.iteration, policy_version=drawn_version, staleness=state.version - drawn_version,
            sample_ids=selection.sample_ids, weights=weights, anchor_weight=state.controller.weight,
            learning_rate=learning_rate(config, state.iteration),
            rewards=reward_terms(config, state.normalisers, scale), constants=state.constants,
        )  # fmt: skip

    def _record_skipped(self, report: TrainReport, handles: Sequence[RolloutHandle]) -> None:
        """Report the skipped optimiser steps, and record the prompts and ids of their samples.

        Raises:
            NonFiniteError: more than `learner.max_skipped_steps` in a row.
        """
        config, iteration, path = self._config, self._state.iteration, self._folder.skipped
        prompts = {
            name: text for handle in handles for name, text in zip(handle.sample_ids, handle.prompts, strict=True)
        }
        with path.open("a", encoding="utf-8") as file:
            for one in report.skipped:
                row = {
                    "iteration": iteration,
                    "step": one.step,
                    "gradient_norm": str(one.gradient_norm),
                    "samples": [{"sample_id": name, "prompt": prompts.get(name)} for name in one.sample_ids],
                }
                file.write(json.dumps(row) + "\n")
        if report.too_many:
            names = [name for one in report.skipped for name in one.sample_ids]
            raise NonFiniteError(
                f"iteration {iteration}: more than learner.max_skipped_steps={config.learner.max_skipped_steps} "
                "consecutive optimiser steps had a non-finite loss or gradient; these steps changed no weight. "
                f"{path} lists their samples ({', '.join(names[:3]) or 'only the gradient was not finite'}). "
                "`--resume auto` with a larger learner.max_skipped_steps continues; a lower learner.learning_rate or "
                "learner.precision=float32 in a new run may avoid them."
            )
        tried = report.optim_steps + len(report.skipped)
        self._console.message(
            f"iteration {iteration + 1}: {len(report.skipped)} of {tried} optimiser steps skipped, because a loss or "
            f"gradient was not finite ({path})"
        )


def _versions(flying: Mapping[str, Any]) -> list[int]:
    """Return the versions that draw the samples in flight."""
    return sorted({version for _, version in flying.get("in_flight", [])})


def run(
    context: RunContext, *, checkpoint: Checkpoint | None = None, on_start: Callable[[], None] | None = None
) -> LoopResult:
    """Train from scratch or from a checkpoint to `run.iterations`.

    Args:
        checkpoint: state to continue from.
        on_start: called once weights are published, before the first iteration (evaluation of the base model).
    """
    trainer = Trainer(context, checkpoint)
    try:
        if on_start is not None:
            on_start()
        return trainer.fit()
    finally:
        trainer.close()
