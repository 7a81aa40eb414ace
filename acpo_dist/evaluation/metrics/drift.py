"""Drift of a policy from its frozen base model, and its denoising error, by timestep.

Legend: B samples. Errors are means over the elements of a sample, in noise units (velocity units for flow models, see
`objective.anchor.loss_space`), then means over samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acpo_dist.core.by_size import Mixed, by_size
from acpo_dist.core.seeding import generator
from acpo_dist.diffusion.prediction import add_noise, flow_scale
from acpo_dist.evaluation.metrics.distances import SampleError
from acpo_dist.models.family import ModelFamily
from acpo_dist.objective.anchor import anchor_error, loss_space, output_drift
from acpo_dist.objective.noise_space import denoising_residual


@dataclass(frozen=True, kw_only=True)
class OutputErrors:
    """Errors of the policy and the base model on the same forward-noised samples, by timestep."""

    anchor: dict[int, float]
    """mean (eps_policy - eps_base)^2."""
    denoising: dict[int, float]
    """mean (eps_policy - eps)^2."""
    base_denoising: dict[int, float]
    """mean (eps_base - eps)^2, with the same noise."""
    num_samples: int

    def to_mapping(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


@torch.no_grad()
def output_errors(
    family: ModelFamily, clean: Mixed, prompts: Sequence[str], timesteps: Sequence[int],
    *, seed: int = 0, batch_size: int = 16, conditioning: Mapping[str, Tensor] | None = None,
) -> OutputErrors:  # fmt: skip
    """Measure drift and denoising error on forward-noised x_0; held-out data gives the reverse KL, see `path_kl`.

    The noise of a sample at a timestep depends only on the seed, the timestep and the sample's index.

    Args:
        family: model loaded with its anchor.
        clean: x_0 (B, C, H, W), or B of several sizes, float32: scaled latents, or pixels in [-1, 1].
        prompts: B prompts; ignored by an unconditional model.
        timesteps: integers of the noise schedule; 0 is only valid if the model does not predict x_0.
        seed: seed of the noise.
        batch_size: samples per forward pass.
        conditioning: conditioning of the B samples besides their prompts, such as original size and crop.

    Returns:
        Errors by timestep.

    Raises:
        SampleError: no samples, or the counts differ.
    """
    _require_prompts(len(clean), prompts)
    sums = {name: dict.fromkeys(timesteps, 0.0) for name in ("anchor", "denoising", "base_denoising")}
    for timestep in timesteps:
        for indices, part in _parts(clean, batch_size):
            noise = torch.stack([_noise(part.shape[1:], seed, timestep, index) for index in indices])
            levels = family.alpha_bars[timestep].cpu().expand(len(part))
            own = part.float().cpu()
            noisy = add_noise(own, noise, levels)
            model_outputs = _outputs(
                family, noisy, float(timestep), [prompts[index] for index in indices],
                {name: value[indices] for name, value in (conditioning or {}).items()},
            )  # fmt: skip
            kind = family.prediction_type
            policy, base = (
                denoising_residual(model_output, noisy, own, noise, levels, kind) for model_output in model_outputs
            )
            drift = output_drift(*model_outputs, levels, kind, loss_space(kind))
            sums["anchor"][timestep] += float(anchor_error(drift).double().sum())
            sums["denoising"][timestep] += float(anchor_error(policy).double().sum())
            sums["base_denoising"][timestep] += float(anchor_error(base).double().sum())
    means = {name: {t: total / len(clean) for t, total in by_t.items()} for name, by_t in sums.items()}
    return OutputErrors(**means, num_samples=len(clean))


def kl_weights(alpha_bars_T: Tensor) -> Tensor:
    """Compute the weight of ||eps_policy - eps_base||^2 in the KL divergence of one DDPM step.

    A table that ends without signal belongs to a flow model; the weights are then those of its velocity, w_t a^2 with
    a = 1 - sigma, which stay finite at the noisy end.

    w_t = beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) with sigma_t^2 = beta_t, the larger of DDPM's two
    variances, so that the last step is finite too. Source: Ho et al. 2020; KL of Gaussians with equal covariance.

    Args:
        alpha_bars_T: cumulative signal fraction, (T,).

    Returns:
        Weight by timestep, float64 (T,).
    """
    alpha_bars = alpha_bars_T.double().cpu()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
    alphas = alpha_bars / before
    if alpha_bars[-1] == 0:
        # a^2 / alpha_t = c^2 alpha_bar_{t-1}, with c of `diffusion.prediction`.
        scale = flow_scale(alpha_bars, alpha_bars)
        return (1 - alphas) * scale.square() * before / (2 * (1 - alpha_bars))
    return (1 - alphas) / (2 * alphas * (1 - alpha_bars))


def path_kl(
    drift_by_timestep: Mapping[int, float] | Mapping[float, float], alpha_bars_T: Tensor, num_elements: float
) -> float:
    """Estimate KL(policy path || base path) of the T-step DDPM, an upper bound on the KL of its images.

    The estimate is sum_t w_t D E(drift_t). The drift is interpolated linearly between the measured timesteps and
    constant beyond them, so the sum is exact if all T are measured. Rollout states give KL(policy || base); base or
    held-out samples give the reverse. Only the conditional branch is covered: classifier-free guidance amplifies
    drift further.

    Args:
        drift_by_timestep: timestep -> mean squared drift per element, in the units of `output_errors`.
        alpha_bars_T: cumulative signal fraction, (T,).
        num_elements: D, elements of one x_0; their mean over samples of several sizes.

    Returns:
        The KL divergence in nats.

    Raises:
        SampleError: no timestep is given, or one lies outside the schedule.
    """
    measured = sorted((float(timestep), value) for timestep, value in drift_by_timestep.items())
    total = len(alpha_bars_T)
    if not measured or measured[0][0] < 0 or measured[-1][0] > total - 1:
        raise SampleError(
            f"path KL needs drift at timesteps in 0..{total - 1}, found {[timestep for timestep, _ in measured]}"
        )
    at, values = [timestep for timestep, _ in measured], [value for _, value in measured]
    drift = np.interp(np.arange(total), at, values)
    return float((kl_weights(alpha_bars_T).numpy() * drift).sum()) * num_elements


def _outputs(
    family: ModelFamily, noisy: Tensor, timestep: float, prompts: Sequence[str],
    conditioning: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the outputs of policy and base model for the same input, on the CPU."""
    device = next(family.network.parameters()).device
    moved, timesteps = noisy.to(device), torch.full((len(noisy),), timestep, device=device)
    condition = family.encode(prompts)
    if conditioning:
        condition = replace(condition, tensors={**condition.tensors, **conditioning})
    policy = family.predict(moved, timesteps, condition)
    with family.anchored():
        base = family.predict(moved, timesteps, condition)
    return policy.cpu(), base.cpu()


def _noise(shape: torch.Size, seed: int, timestep: int, index: int) -> Tensor:
    return torch.randn(shape, generator=generator("evaluation-noise", seed, timestep, index))


def _batches(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def _parts(clean: Mixed, size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (indices, x_0) of up to `size` samples of one size."""
    for indices, part in by_size(clean):
        for few in _batches(len(part), size):
            yield indices[few.start : few.stop], part[few.start : few.stop]


def _require_prompts(count: int, prompts: Sequence[str]) -> None:
    if not count or len(prompts) != count:
        raise SampleError(f"drift needs a prompt for each of at least one sample, found {count} and {len(prompts)}")
