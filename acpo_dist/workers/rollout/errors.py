"""Prediction error of the current model at each node, on forward-noised samples with the same noise at all nodes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from acpo_dist.core.seeding import derive_seed
from acpo_dist.diffusion.prediction import add_noise, to_noise
from acpo_dist.models.family import ModelFamily
from acpo_dist.objective.anchor import output_drift
from acpo_dist.objective.noise_space import denoising_residual
from acpo_dist.vrg.levels import to_alpha_bars
from acpo_dist.vrg.sums import ErrorSums, sums_of
from acpo_dist.vrg.timesteps import to_timesteps


@torch.no_grad()
def measure_errors(
    family: ModelFamily, clean: Tensor, prompts: Sequence[str], sample_ids: Sequence[str], sigmas: Sequence[float]
) -> ErrorSums:  # fmt: skip
    """Return the error sums of one batch, e = eps_hat(x_t, t) - eps at every node, with one eps per sample.

    eps_hat is the noise prediction of the sampler, after the scheduler's x_0 rule.

    Args:
        clean: x_0 (B, C, H, W), latents or pixels in [-1, 1].
        sample_ids: seed each sample's noise, so that the result is independent of the distribution over workers.
        sigmas: K nodes, ascending, within the schedule.

    Raises:
        VrgError: a node is outside the schedule, or a prediction is not finite.
    """
    keys = [derive_seed("vrg", sample_id) for sample_id in sample_ids]
    noise = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(key)) for key in keys])
    clean, noise = clean.to(family.device).float(), noise.to(family.device)
    condition = family.encode(prompts)
    levels = to_alpha_bars(sigmas)
    timesteps = to_timesteps(sigmas, family.alpha_bars.numpy())
    rule, kind = family.clean_rule, family.prediction_type
    changed: list[np.ndarray] = []
    errors: list[np.ndarray] = []
    for level, timestep in zip(levels, timesteps, strict=True):
        alpha_bars = torch.full((len(clean),), float(level), dtype=torch.float64, device=clean.device)
        noisy = add_noise(clean, noise, alpha_bars)
        at = torch.full((len(clean),), float(timestep), device=clean.device)
        model_output = family.predict(noisy, at, condition)
        changed.append(rule.share_changed(model_output, noisy, alpha_bars, kind).cpu().numpy())
        model_output = rule.apply(model_output, noisy, alpha_bars, kind)
        if kind == "flow_prediction":
            # d eps = a dv: near pure noise a difference of noise predictions would be rounding error.
            residual = denoising_residual(model_output, noisy, clean, noise, alpha_bars, kind)
            error = output_drift(residual, torch.zeros_like(residual), alpha_bars, kind, "eps")
        else:
            error = to_noise(model_output, noisy, alpha_bars, kind) - noise
        errors.append(error.flatten(2).double().cpu().numpy())
    return sums_of(sigmas, np.stack(errors), np.stack(changed))
