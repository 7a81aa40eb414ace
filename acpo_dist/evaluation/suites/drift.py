"""Drift of a run from its base model by timestep, on the run's own samples."""

from collections.abc import Sequence
from typing import Any

from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.core.types import PromptGroup
from acpo_dist.evaluation.metrics.arm import DRIFT_TIMESTEPS
from acpo_dist.evaluation.metrics.drift import output_errors, path_kl
from acpo_dist.evaluation.suites.backend import Backend
from acpo_dist.evaluation.suites.subject import ModelSubject, settle
from acpo_dist.models.family import copy_weights
from acpo_dist.training.local import default_device


def run_drift(subject: ModelSubject, groups: Sequence[PromptGroup], backend: Backend) -> dict[str, Any]:
    """Measure anchor error and denoising error by timestep on the run's own x_0, and the resulting path KL.

    The x_0 are forward-noised, so the KL is an estimate of KL(policy || base) of the conditional branch.

    Args:
        subject: checkpoint of a run.
        groups: prompts and seeds of the samples; they are sampled again with the same seeds.
        backend: provides the workers.

    Returns:
        JSON-compatible metrics.
    """
    with backend.rollouts(subject.config) as pool:
        settle(pool, subject)
        clean = pool.final_latents(groups, pool.trajectory())
    config = subject.config.model
    family = resolve("model", MODELS, config.type).load(config, device=default_device(), trainable=True)
    assert subject.bundle is not None, "only a run's checkpoint can have drifted"
    copy_weights(family.network, subject.bundle.tensors)
    prompts = [plan.prompt for group in groups for plan in group.samples]
    errors = output_errors(family, clean, prompts, DRIFT_TIMESTEPS)
    elements = sum(latents.numel() for latents in clean) / len(clean)
    mean = sum(errors.anchor.values()) / len(errors.anchor)
    return {
        **errors.to_mapping(),
        "rms": mean**0.5,
        "path_kl_nats": path_kl(errors.anchor, family.alpha_bars, elements),
    }
