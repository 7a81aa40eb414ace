"""Metrics of one policy on fixed prompts and seeds: rewards, judges, drift, and the exact oracle of the toy world."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from acpo_dist.core.ports import LearnerGroup, RewardPool, RolloutPool
from acpo_dist.core.types import PromptGroup
from acpo_dist.data.toy.oracle import judge_exactly

DRIFT_TIMESTEPS = (20, 100, 200, 300, 600, 900)
"""Timesteps of the noise-space drift: late ones, where the reward acts, and early ones, which should not drift."""
_DRIFT_SAMPLES = 96


@dataclass(frozen=True, kw_only=True)
class ArmReport:
    """Means over the evaluation samples."""

    scores: dict[str, float]
    """Metric name -> mean raw score."""
    drift: float
    """Root mean square over timesteps and samples of the noise-space distance from the base model."""
    drift_by_timestep: dict[int, float]
    """Mean squared drift."""
    oracle: dict[str, float | None]
    """Exact metrics of the toy world."""
    images: Tensor
    """uint8 (B, 3, H, W), in prompt order."""


def evaluate_toy_arm(
    rollout: RolloutPool,
    reward: RewardPool,
    learner: LearnerGroup,
    groups: Sequence[PromptGroup],
    metrics: Sequence[str],
) -> ArmReport:
    """Sample, score and judge with the weights that the workers currently hold.

    Args:
        rollout: workers that draw the samples.
        reward: workers that score them.
        learner: ranks that measure the drift.
        groups: prompts with their seeds.
        metrics: names of the rewards and judges to report.
    """
    handles = rollout.generate(groups)
    scores = reward.score(handles, metrics)
    ids = [plan.sample_id for group in groups for plan in group.samples]
    prompts = [plan.prompt for group in groups for plan in group.samples]
    # The exact oracle knows images of one size.
    images = torch.stack(list(rollout.images(handles, ids)))
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
