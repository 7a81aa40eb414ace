"""The training iteration, written on the ports. It knows neither Ray nor DeepSpeed, and runs the same in one process.

deal prompts -> draw samples -> score them -> update on gradients from the pool -> publish verified weights -> record.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from acpo_dist.algorithms.base import Algorithm
from acpo_dist.config.schema import Config
from acpo_dist.core.clock import PhaseClock
from acpo_dist.core.errors import NonFiniteError
from acpo_dist.core.ports import Ports
from acpo_dist.core.registry import ALGORITHMS, resolve
from acpo_dist.core.types import (
    Normaliser,
    PromptGroup,
    RolloutHandle,
    ScoredGroups,
    ScoreTable,
    Selection,
    TrainReport,
    TrainTask,
)
from acpo_dist.data.prompts import sample_prompts
from acpo_dist.objective.composition import compose
from acpo_dist.tracking.console import Console
from acpo_dist.tracking.images import save_grid
from acpo_dist.training.calibration import LoopState, calibrate, measure_gain, names_of, resume, reward_terms
from acpo_dist.training.guard.guard import Decision
from acpo_dist.training.guard.monitor import GuardMonitor
from acpo_dist.training.run_folder import RunFolder
from acpo_dist.training.trajectory.manager import TrajectoryManager
from acpo_dist.workers.learner.checkpoint import Checkpoint
from acpo_dist.workers.learner.rates import learning_rate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """How the run ended."""

    iterations: int
    version: int
    last_metrics: dict[str, float]
    guard: Decision | None
    """Why the guard ended the run early, or None."""


def run(
    config: Config, ports: Ports, folder: RunFolder, prompts: Sequence[str], console: Console,
    *, checkpoint: Checkpoint | None = None, on_start: Callable[[], None] | None = None,
) -> LoopResult:  # fmt: skip
    """Train from scratch or from a checkpoint to `run.iterations`.

    Args:
        checkpoint: where to go on from.
        on_start: called when weights are in place, before the first iteration (evaluation of the base model).
    """
    ports.learner.start(checkpoint.learner_folder if checkpoint else None)
    manager = TrajectoryManager(config, ports.rollout, folder, ports.tracker, prompts, console)
    trajectory_metrics: dict[str, float] = {}
    if checkpoint:
        manager.restore(checkpoint.state)
    else:
        trajectory_metrics = manager.start()
    algorithm: Algorithm = resolve("algorithm", ALGORITHMS, config.algorithm.type)(config.algorithm)
    monitor = GuardMonitor(config, ports.rollout, folder, ports.tracker, console)
    if checkpoint:
        state = resume(config, checkpoint)
        monitor.restore(checkpoint.state)
    else:
        state = calibrate(config, ports, algorithm, prompts, console, monitor)
        if config.guard.action == "roll_back":
            _save(config, ports, folder, state, manager, monitor, prompts, console)
    ports.weights.publish(state.version)
    if on_start is not None:
        on_start()
    metrics: dict[str, float] = {}
    while state.iteration < config.run.iterations:
        metrics = _iterate(config, ports, algorithm, state, prompts, console, monitor, folder) | trajectory_metrics
        done = state.iteration
        # After the update and before the next rollouts: a trajectory never changes within an iteration.
        metrics, trajectory_metrics = metrics | manager.after(done), {}
        folder.require_ours()
        ports.tracker.log_metrics(done - 1, metrics)
        stopped = monitor.decision is not None and monitor.decision.ends
        console.iteration(done, config.run.iterations, metrics, last=stopped)
        last = done == config.run.iterations or stopped
        # Workers hold no weights of an iteration that was taken back.
        taken_back = stopped and monitor.decision is not None and monitor.decision.action == "roll_back"
        if (done % config.tracking.images_every == 0 or last) and not taken_back:
            _image(config, ports, folder, prompts, done, console)
        if done % config.checkpoint.every == 0 or last:
            _save(config, ports, folder, state, manager, monitor, prompts, console)
        if stopped:
            break
    # A line of its own, one past the last iteration: a longer run that goes on from here drops it again.
    gain = measure_gain(config, ports, state, prompts, console)
    folder.require_ours()
    ports.tracker.log_metrics(state.iteration, gain)
    console.message("gain in base standard deviations: " + ", ".join(f"{n[5:]} {v:+.2f}" for n, v in gain.items()))
    return LoopResult(
        iterations=state.iteration,
        version=state.version,
        last_metrics=metrics | gain,
        guard=monitor.decision if monitor.decision is not None and monitor.decision.ends else None,
    )


def _iterate(
    config: Config, ports: Ports, algorithm: Algorithm, state: LoopState, prompts: Sequence[str], console: Console,
    monitor: GuardMonitor, folder: RunFolder,
) -> dict[str, float]:  # fmt: skip
    """One rollout -> reward -> update -> sync cycle; moves `state` on."""
    clock = PhaseClock()
    groups = sample_prompts(
        prompts,
        iteration=state.iteration,
        run_seed=config.run.seed,
        num_prompts=config.rollout.prompts_per_iteration,
        samples_per_prompt=config.rollout.samples_per_prompt,
    )
    total = sum(len(group.samples) for group in groups)
    with clock.phase("rollout"), console.phase("rollout", total) as advance:
        handles = ports.rollout.generate(groups, advance)
    names = [*names_of(config.rewards.train), *names_of(config.rewards.judges)]
    with clock.phase("reward"), console.phase("reward", total * len(names)) as advance:
        scores = ports.reward.score(handles, names, advance)
    chosen = _select(config, ports, algorithm, state, groups, handles, scores)
    scale = monitor.reward_scale
    task = TrainTask(
        iteration=state.iteration,
        policy_version=state.version,
        sample_ids=chosen.sample_ids,
        # A pathwise objective is scaled by its reward terms; one that sees scores only, by its samples' weights.
        weights=chosen.weights if config.algorithm.pathwise else {n: scale * w for n, w in chosen.weights.items()},
        anchor_weight=state.controller.weight,
        learning_rate=learning_rate(config, state.iteration),
        rewards=reward_terms(config, state.normalisers, scale),
        constants=state.constants,
    )
    with clock.phase("learn"), console.phase("learn", len(task.sample_ids)) as advance:
        report = ports.learner.train(handles, task, advance)
    with clock.phase("probe"):
        probe = monitor.probe(ports.learner, handles)
    folder.require_ours()
    if report.skipped:
        _record_skipped(config, folder, state.iteration, report, handles, console)
    moved = report.optim_steps > 0
    drift = _drift_of(config, report.metrics) if moved else state.drift
    metrics = {
        **_score_metrics(config, scores, state.normalisers),
        **report.metrics,
        **chosen.metrics,
        "anchor/weight": state.controller.weight,
        "learner/learning_rate": task.learning_rate,
        "learner/skipped_steps": float(len(report.skipped)),
        "drift/rms": drift**0.5,
        **{f"drift/at/{timestep}": value for timestep, value in probe.items()},
        **ports.reward.counters(),
    }
    if state.controller.budget is not None:
        metrics["drift/budget"] = state.controller.budget
    with clock.phase("guard"):
        decision = monitor.check(state.iteration, handles, scores, state.normalisers, drift_rms=drift**0.5, probe=probe)
    # Weights that are taken back are never drawn with: workers keep those of the iteration before.
    if decision.action != "roll_back":
        with clock.phase("sync"):
            ports.weights.publish(state.version + 1)
        state.version += 1
    if moved:
        state.controller, state.drift = state.controller.update(drift), drift
    state.iteration += 1
    return metrics | decision.to_metrics() | {"sync/version": float(state.version)} | clock.metrics()


def _record_skipped(
    config: Config, folder: RunFolder, iteration: int, report: TrainReport, handles: Sequence[RolloutHandle],
    console: Console,
) -> None:  # fmt: skip
    """Say which steps were left out, and keep what is needed to draw their samples again.

    Raises:
        NonFiniteError: they were too many in a row.
    """
    prompts = {name: text for handle in handles for name, text in zip(handle.sample_ids, handle.prompts, strict=True)}
    with folder.skipped.open("a", encoding="utf-8") as file:
        for one in report.skipped:
            samples = [{"sample_id": name, "prompt": prompts.get(name)} for name in one.sample_ids]
            row = {
                "iteration": iteration,
                "step": one.step,
                "gradient_norm": str(one.gradient_norm),
                "samples": samples,
            }
            file.write(json.dumps(row) + "\n")
    if report.too_many:
        names = [name for one in report.skipped for name in one.sample_ids]
        raise NonFiniteError(
            f"iteration {iteration}: more than learner.max_skipped_steps={config.learner.max_skipped_steps} optimiser "
            "steps in a row had a loss or gradient that is not finite; no weight has changed in them. "
            f"{folder.skipped} has their samples ({', '.join(names[:3]) or 'gradients alone'}). `--resume auto` "
            "with a larger learner.max_skipped_steps goes on past them; a new run with a lower learner.learning_rate, "
            "or learner.precision=float32, may not meet them."
        )
    tried = report.optim_steps + len(report.skipped)
    console.message(
        f"iteration {iteration + 1}: {len(report.skipped)} of {tried} optimiser steps left out, since a loss or "
        f"gradient was not finite ({folder.skipped})"
    )


def _drift_of(config: Config, metrics: Mapping[str, float]) -> float:
    """The larger of the mean squared drifts that were measured.

    Raises:
        NonFiniteError: none was, so nobody could say whether the policy is still near the base model.
    """
    found = [metrics[name] for name in ("anchor/late", "anchor/uniform") if name in metrics]
    if not found:
        raise NonFiniteError(
            f"algorithm `{config.algorithm.type}` reported no drift: its figures lack anchor/late and anchor/uniform, "
            "or no sample of this iteration could be read"
        )
    return max(found)


def _select(
    config: Config, ports: Ports, algorithm: Algorithm, state: LoopState, groups: Sequence[PromptGroup],
    handles: Sequence[RolloutHandle], scores: ScoreTable,
) -> Selection:  # fmt: skip
    """What the learner is to train on: rollouts as the algorithm chose them, or pairs of a data set."""
    if ports.pairs is not None:
        count = config.rollout.prompts_per_iteration * config.rollout.samples_per_prompt // 2
        ids = ports.pairs.sample_prompts(iteration=state.iteration, count=count, run_seed=config.run.seed)
        metrics = {f"pairs/{name}": float(value) for name, value in ports.pairs.counts.items()}
        return Selection(sample_ids=tuple(ids), weights=dict.fromkeys(ids, 1.0), metrics=metrics)
    train = [entry for entry in config.rewards.train]
    ids = [plan.sample_id for group in groups for plan in group.samples]
    return algorithm.select(
        ScoredGroups(
            groups=tuple(groups),
            qualities={
                entry.name: {name: state.normalisers[entry.name].reward(scores[entry.name][name]) for name in ids}
                for entry in train
            },
            weights=config.rewards.term_weights(),
            spread=config.rewards.spread,
            images=lambda: dict(zip(ids, ports.rollout.images(handles, ids), strict=True)),
        )
    )


def _save(
    config: Config, ports: Ports, folder: RunFolder, state: LoopState, manager: TrajectoryManager,
    monitor: GuardMonitor, prompts: Sequence[str], console: Console,
) -> None:  # fmt: skip
    folder.require_ours()
    partial = folder.checkpoints.prepare(state.iteration)
    try:
        ports.learner.save(partial / "learner")
        # What a run may be rolled back to is measured with the saved weights; running means lag behind them.
        ended = monitor.decision is not None and monitor.decision.ends
        exact = config.guard.action == "roll_back" and config.rewards.judges and state.iteration > 0 and not ended
        gains = measure_gain(config, ports, state, prompts, console) if exact else {}
        judges = {name: gains[f"gain/{name}"] for name in names_of(config.rewards.judges)} if gains else None
        monitor.saved(state.iteration, judges)
        mapping = state.to_mapping() | manager.to_mapping() | monitor.to_mapping()
        folder.require_ours()
        path = folder.checkpoints.commit(partial, state.iteration, mapping, protect=monitor.best_iteration)
    except BaseException:
        # Whatever it was: half a checkpoint only takes room, which a full disk may need.
        folder.checkpoints.discard(partial)
        raise
    ports.tracker.set_tags({"checkpoint": str(path), "checkpoint_iteration": state.iteration})
    logger.info("checkpoint %s", path)


def _image(
    config: Config, ports: Ports, folder: RunFolder, prompts: Sequence[str], iteration: int, console: Console
) -> None:
    """A grid from the same prompts and seeds at every call."""
    groups = fixed_groups(config, prompts, config.tracking.num_images, stream="grid")
    handles = ports.rollout.generate(groups)
    ids = [plan.sample_id for group in groups for plan in group.samples]
    path = folder.samples / f"{iteration:06d}.png"
    save_grid(ports.rollout.images(handles, ids), path, columns=min(8, len(ids)))
    ports.tracker.log_image("samples", iteration, path)


def fixed_groups(config: Config, prompts: Sequence[str], count: int, *, stream: str) -> list[PromptGroup]:
    """Samples that are the same for every policy version: one per prompt."""
    return sample_prompts(
        prompts, iteration=0, run_seed=config.run.seed, num_prompts=count, samples_per_prompt=1, stream=stream
    )


def _score_metrics(config: Config, scores: ScoreTable, normalisers: dict[str, Normaliser]) -> dict[str, float]:
    metrics = {}
    for kind, entries in (("reward", config.rewards.train), ("judge", config.rewards.judges)):
        for name in names_of(entries):
            values = list(scores[name].values())
            metrics[f"{kind}/{name}/mean"] = sum(values) / len(values)
            metrics[f"{kind}/{name}/min"] = min(values)
            metrics[f"{kind}/{name}/max"] = max(values)
            # In standard deviations of base samples, higher is better whatever the metric's own direction.
            metrics[f"{kind}/{name}/gain"] = sum(map(normalisers[name].normalise, values)) / len(values)
            ceiling = normalisers[name].ceiling
            if kind == "reward" and ceiling is not None:
                reached = [normalisers[name].normalise(value) >= ceiling for value in values]
                metrics[f"reward/{name}/at_hinge"] = sum(reached) / len(values)
    weights = config.rewards.term_weights()
    if len(weights) > 1:
        # What the algorithm sees.
        rows = zip(*(map(normalisers[name].reward, scores[name].values()) for name in weights), strict=True)
        combined = [compose(row, list(weights.values()), config.rewards.spread) for row in rows]
        metrics["reward/combined/mean"] = sum(combined) / len(combined)
    return metrics
