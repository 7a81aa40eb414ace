"""Calibration on samples of the base model: normalisers, first anchor weight, and the state that a run carries."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from acpo_dist.algorithms.base import Algorithm
from acpo_dist.config.schema import Config
from acpo_dist.core.types import Normaliser, RewardTerm, RolloutHandle, ScoreTable
from acpo_dist.data.images import real_images
from acpo_dist.data.prompts import sample_prompts, size_mix
from acpo_dist.objective.controller import DriftController, initial_anchor_weight
from acpo_dist.objective.normalise import fit_normaliser
from acpo_dist.training.base_check import check_base
from acpo_dist.training.context import RunContext
from acpo_dist.training.guard.monitor import GuardMonitor
from acpo_dist.workers.learner.checkpoint import Checkpoint

THROUGH_STEPS = 0.02
"""Default of `algorithm.anchor.start` with the gradient through sampler steps; docs/algorithms.md has the studies."""


@dataclass
class LoopState:
    """State of the loop that a checkpoint saves besides the learner's tensors."""

    iteration: int
    version: int
    controller: DriftController
    normalisers: dict[str, Normaliser]
    constants: dict[str, float]
    """Constants that the algorithm computed on base samples."""
    drift: float = 0.0
    """Mean squared drift of the last iteration in which the weights changed."""

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data for `state.json`; floats survive the round trip through JSON exactly."""
        return {
            "version": self.version,
            "anchor_weight": self.controller.weight,
            "anchor_excess": self.controller.last_excess,
            "constants": self.constants,
            "drift": self.drift,
            "normalisers": {name: vars(value) for name, value in self.normalisers.items()},
        }


def calibrate(context: RunContext, algorithm: Algorithm, guard: GuardMonitor) -> LoopState:
    """Fit a normaliser per metric on base-model samples and compute the first anchor weight."""
    config, console = context.config, context.console
    handles = _generate_calibration(context, "calibration")
    # Before the scores: a broken base model is reported as such, and not as a metric that fails on its images.
    check_base(context, handles)
    scores = _score(context, handles, "calibration")
    guard.calibrate(handles)
    quantile = getattr(config.algorithm, "target_quantile", None)
    normalisers = {
        entry.name: fit_normaliser(
            entry.name, list(scores[entry.name].values()), higher_is_better=_higher(entry), target_quantile=quantile
        )
        for entry in (*config.rewards.train, *config.rewards.judges)
    }
    # Without ceilings: where most base samples reach one, the gradient is 0 and the anchor would start at 0, which
    # means off.
    controller = _controller(config, _first_weight(context, handles, reward_terms(config, normalisers)))
    normalisers = _with_ceilings(context, handles, normalisers)
    console.message(
        "calibrated on {} base samples: {}; anchor weight {:.4g}".format(
            len(next(iter(scores.values()))),
            ", ".join(f"{name} {value.mean:.4g} ± {value.std:.4g}" for name, value in normalisers.items()),
            controller.weight,
        )
    )
    constants = algorithm.calibrate(context.ports.learner.observe(handles))
    if constants:
        console.message("calibrated: " + ", ".join(f"{name} {value:.4g}" for name, value in constants.items()))
    return LoopState(iteration=0, version=0, controller=controller, normalisers=normalisers, constants=constants)


def _with_ceilings(
    context: RunContext, handles: Sequence[RolloutHandle], normalisers: dict[str, Normaliser]
) -> dict[str, Normaliser]:
    """Set the normalised `hinge` score of a reward as its ceiling, and as the target of a hinge-shaped objective."""
    config, ports, console = context.config, context.ports, context.console
    found = dict(normalisers)
    for entry in config.rewards.train:
        hinge = getattr(entry, "hinge", None)
        if hinge is None:
            continue
        ceiling, source = hinge, "as configured"
        if isinstance(hinge, Path):
            # At the size of the model's images, since the score of some metrics depends on the size.
            height, width = ports.rollout.images(handles, handles[0].sample_ids[:1])[0].shape[1:]
            images = torch.stack(
                real_images(
                    hinge,
                    column=config.data.image_column,
                    size=(width, height),
                    most=config.rewards.calibration_samples,
                )
            )
            scores = ports.reward.score_images(entry.name, images)
            ceiling = sum(map(normalisers[entry.name].normalise, scores)) / len(scores)
            source = f"the mean of {len(scores)} real images of {hinge}"
        console.message(f"hinge of {entry.name}: {ceiling:+.3f} base standard deviations, {source}")
        if ceiling <= 0:
            console.message(
                f"warning: this hinge is not above the average base sample, so {entry.name} can gain little"
            )
        found[entry.name] = replace(normalisers[entry.name], target=ceiling, ceiling=ceiling)
    return found


def _generate_calibration(context: RunContext, label: str) -> list[RolloutHandle]:
    """Generate the calibration samples with the current weights; prompts and seeds never change."""
    config = context.config
    per_prompt = config.rollout.samples_per_prompt
    groups = sample_prompts(
        context.prompts, iteration=0, run_seed=config.run.seed, stream="calibration",
        num_prompts=-(-config.rewards.calibration_samples // per_prompt), samples_per_prompt=per_prompt,
        mix=size_mix(config),
    )  # fmt: skip
    total = sum(len(group.samples) for group in groups)
    with context.console.phase(f"{label}: rollout", total) as advance:
        return context.ports.rollout.generate(groups, advance)


def _score(context: RunContext, handles: Sequence[RolloutHandle], label: str) -> ScoreTable:
    names = [*names_of(context.config.rewards.train), *names_of(context.config.rewards.judges)]
    total = sum(len(handle.sample_ids) for handle in handles) * len(names)
    with context.console.phase(f"{label}: reward", total) as advance:
        return context.ports.reward.score(handles, names, advance)


def measure_gain(context: RunContext, state: LoopState) -> dict[str, float]:
    """Return the mean normalised score of the current weights on the calibration samples; the base model has 0."""
    scores = _score(context, _generate_calibration(context, "gain"), "gain")
    return {
        f"gain/{name}": sum(normaliser.normalise(score) for score in scores[name].values()) / len(scores[name])
        for name, normaliser in state.normalisers.items()
    }


def _first_weight(context: RunContext, handles: Sequence[RolloutHandle], terms: tuple[RewardTerm, ...]) -> float:
    config = context.config
    anchor = config.algorithm.anchor
    if anchor.weight != "auto":
        return float(anchor.weight)
    if anchor.budget is None:
        return 0.0
    # Without an objective the anchor trains alone, and any positive weight has the same effect.
    reward_weight = config.algorithm.reward_weight or 1.0
    start = start_factor(config)
    if not config.algorithm.pathwise:
        return start * reward_weight * config.algorithm.anchor_unit
    scale = context.ports.learner.gradient_scale(handles, terms)
    return start * initial_anchor_weight(
        reward_weight=reward_weight, num_elements=scale.num_elements,
        gradient_norm=scale.median_norm, budget=anchor.budget,
    )  # fmt: skip


def start_factor(config: Config) -> float:
    """Return the dimensionless factor of the calibrated anchor weight, with `auto` resolved."""
    if config.algorithm.anchor.start != "auto":
        return config.algorithm.anchor.start
    return 1.0 if getattr(config.algorithm, "gradient_steps", "estimate") == "estimate" else THROUGH_STEPS


def _controller(config: Config, weight: float, last_excess: float | None = None) -> DriftController:
    anchor = config.algorithm.anchor
    # A weight of 0 switches the anchor off, so the controller must not change it.
    steered = anchor.budget is not None and weight > 0
    return DriftController(
        weight=weight, budget=anchor.budget if steered else None, rate=anchor.rate, headroom=anchor.headroom,
        last_excess=last_excess,
    )  # fmt: skip


def resume(config: Config, checkpoint: Checkpoint) -> LoopState:
    """Return the state in a checkpoint."""
    state = checkpoint.state
    return LoopState(
        iteration=checkpoint.iteration,
        version=int(state["version"]),
        controller=_controller(config, float(state["anchor_weight"]), last_excess=state["anchor_excess"]),
        constants=dict(state["constants"]),
        drift=float(state.get("drift", 0.0)),
        normalisers={name: Normaliser(**value) for name, value in state["normalisers"].items()},
    )


def reward_terms(config: Config, normalisers: dict[str, Normaliser], scale: float = 1.0) -> tuple[RewardTerm, ...]:
    """Return the training rewards, with their configured weights times `scale`, the guard's reward scale."""
    return tuple(
        RewardTerm(name=name, weight=scale * weight, normaliser=normalisers[name])
        for name, weight in config.rewards.term_weights().items()
    )


def names_of(entries: Sequence[Any]) -> list[str]:
    """Return the names of rewards or judges, in configuration order."""
    return [entry.name for entry in entries]


def _higher(entry: Any) -> bool:
    return entry.direction > 0
