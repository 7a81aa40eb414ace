"""Figures of one policy on fixed prompts and seeds: rewards, judges, drift, and for the toy world the exact oracle."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from acpo_dist.core.ports import LearnerGroup, RewardPool, RolloutPool
from acpo_dist.core.types import PromptGroup
from acpo_dist.data.toy.oracle import judge_exactly

DRIFT_TIMESTEPS = (20, 100, 200, 300, 600, 900)
"""Where noise-space drift is measured: late steps, where the reward acts, and early ones, which must not move."""
_DRIFT_SAMPLES = 96


@dataclass(frozen=True, kw_only=True)
class ArmReport:
    """Means over the evaluation samples."""

    scores: dict[str, float]
    """metric name -> mean raw score."""
    drift: float
    """Root mean square over timesteps and samples of the noise-space distance from the base model."""
    drift_by_timestep: dict[int, float]
    """Mean squared drift."""
    oracle: dict[str, float | None]
    """Exact figures of the toy world."""
    images: Tensor
    """uint8 (B, 3, H, W), in the order of the prompts."""


def evaluate_toy_arm(
    rollout: RolloutPool,
    reward: RewardPool,
    learner: LearnerGroup,
    groups: Sequence[PromptGroup],
    metrics: Sequence[str],
) -> ArmReport:
    """Draw, score and judge exactly with the weights that the workers hold now."""
    handles = rollout.generate(groups)
    scores = reward.score(handles, metrics)
    ids = [plan.sample_id for group in groups for plan in group.samples]
    prompts = [plan.prompt for group in groups for plan in group.samples]
    images = rollout.images(handles, ids)
    held = [
        handle
        for index, handle in enumerate(handles)
        if sum(len(h.sample_ids) for h in handles[:index]) < _DRIFT_SAMPLES
    ]
    drift = learner.measure_drift(held, DRIFT_TIMESTEPS)
    return ArmReport(
        scores={name: fmean(scores[name][sample_id] for sample_id in ids) for name in metrics},
        drift=fmean(drift.values()) ** 0.5,
        drift_by_timestep=drift,
        oracle=judge_exactly(images.float() / 255, prompts).as_dict(),
        images=images,
    )
