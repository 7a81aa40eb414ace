"""Denoising error of a run and of its base model on held-out captioned images."""

from typing import Any

from acpo_dist.core.registry import MODELS, resolve
from acpo_dist.evaluation.metrics.arm import DRIFT_TIMESTEPS
from acpo_dist.evaluation.metrics.drift import output_errors
from acpo_dist.evaluation.suites.subject import ModelSubject
from acpo_dist.models.family import copy_weights
from acpo_dist.training.local import default_device, latent_cache
from acpo_dist.workers.learner.real_images import RealImages

_AT_ONCE = 16


def held_out_denoising(subject: ModelSubject) -> dict[str, Any] | None:
    """Measure mean (eps_hat - eps)^2 of the run's weights and of the base model, on the same images and noise.

    Args:
        subject: checkpoint of a run.

    Returns:
        JSON-compatible metrics; None if the run holds no captioned images out.
    """
    config = subject.config
    if config.data.path is None or config.data.held_out == 0 or config.model.pixel_space:
        return None
    family = resolve("model", MODELS, config.model.type).load(config.model, device=default_device(), trainable=True)
    assert subject.bundle is not None, "only a run's checkpoint has weights of its own"
    copy_weights(family.network, subject.bundle.tensors)
    images = RealImages(config.data, family, latent_cache(config), held_out=True)
    sums: dict[str, dict[int, float]] = {name: dict.fromkeys(DRIFT_TIMESTEPS, 0.0) for name in ("model", "base")}
    for number, batch in enumerate(images.in_order(_AT_ONCE)):
        errors = output_errors(
            family, batch.clean, batch.captions, DRIFT_TIMESTEPS, seed=number, batch_size=_AT_ONCE,
            conditioning=batch.conditioning,
        )  # fmt: skip
        for name, found in (("model", errors.denoising), ("base", errors.base_denoising)):
            for timestep, value in found.items():
                sums[name][timestep] += value * len(batch.captions)
    means = {name: {t: total / len(images) for t, total in by_t.items()} for name, by_t in sums.items()}
    model, base = (sum(means[name].values()) / len(DRIFT_TIMESTEPS) for name in ("model", "base"))
    return {
        "images": str(config.data.path), "num_images": len(images), "model": model, "base": base,
        "ratio": model / base, "by_timestep": means,
    }  # fmt: skip
