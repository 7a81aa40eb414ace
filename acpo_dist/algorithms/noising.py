"""Forward noising of x_0 with one seed per sample, independent of rank and micro-batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acpo_dist.algorithms.base import MicroBatch, Network
from acpo_dist.algorithms.config import TimestepsConfig
from acpo_dist.diffusion.flow import shifted
from acpo_dist.diffusion.prediction import add_noise

UNIFORM = TimestepsConfig()
"""Uniform timesteps, drawn as integers."""


@dataclass(frozen=True, kw_only=True)
class NoisedStates:
    """x_t of B samples with the drawn timesteps, noise and conditioning."""

    latents: Tensor
    """x_t = a x_0 + s eps, (B, C, H, W)."""
    noise: Tensor
    """eps."""
    timesteps_B: Tensor
    alpha_bars_B: Tensor
    """float64."""
    is_null_B: Tensor
    """bool: the sample is predicted without its prompt."""
    condition: Any
    """Conditioning of the samples; that of the null prompt where `is_null_B`."""


def noise_forward(
    batch: MicroBatch, network: Network, *, lowest: int = 0, t_max: float = 1.0, null_share: float = 0.0,
    offset: float = 0.0, drawing: TimestepsConfig = UNIFORM, condition: Any = None,
) -> NoisedStates:  # fmt: skip
    """Noise `batch.clean` at timesteps drawn from [lowest, t_max T).

    Args:
        batch: samples with `clean` (B, C, H, W) and one noise key each.
        network: provides the noise schedule and encodes prompts.
        lowest: smallest timestep.
        t_max: upper bound of the timesteps as a share of T.
        null_share: probability that a sample is predicted without its prompt.
        offset: standard deviation of a constant per sample and channel that is added to the noise.
        drawing: distribution of the timesteps in that range.
        condition: conditioning of the prompts; None encodes them.
    """
    device, levels = batch.clean.device, network.alpha_bars
    prompts = batch.prompts if batch.clean_prompts is None else batch.clean_prompts
    if not any(prompts):
        # Only the branch without prompts exists.
        null_share = 0.0
    highest = max(lowest + 1, round(t_max * len(levels)))
    shape = batch.clean.shape[1:]
    draws = [_draw(key, shape, lowest, highest, null_share, offset, drawing) for key in batch.noise_keys]
    timesteps = torch.tensor([timestep for timestep, _, _ in draws], device=device)
    is_null = torch.tensor([null for _, null, _ in draws], device=device)
    noise = torch.stack([noise for _, _, noise in draws]).to(device)
    alpha_bars = levels[timesteps.cpu()].to(device)
    if condition is None:
        extra = batch.clean_conditioning
        condition = network.encode(prompts, extra) if extra else network.encode(prompts)
    if null_share > 0:
        condition = condition.where_null(is_null, network.encode([""] * len(draws)))
    return NoisedStates(
        latents=add_noise(batch.clean, noise, alpha_bars), noise=noise, timesteps_B=timesteps,
        alpha_bars_B=alpha_bars, is_null_B=is_null, condition=condition,
    )  # fmt: skip


def split_branches(error_B: Tensor, is_null_B: Tensor) -> dict[str, Tensor]:
    """Split per-sample errors (B,) by branch; each entry holds only the samples of that branch."""
    parts = {"anchor/conditional": error_B[~is_null_B], "anchor/null": error_B[is_null_B]}
    return {name: values for name, values in parts.items() if len(values)}


def draw_timestep(generator: torch.Generator, lowest: int, highest: int, drawing: TimestepsConfig) -> int:
    """Draw a timestep from [lowest, highest).

    Args:
        generator: source of random numbers.
        lowest: smallest timestep.
        highest: upper bound.
        drawing: distribution of the timestep's share of the range.
    """
    if drawing == UNIFORM:
        return int(torch.randint(lowest, highest, (), generator=generator))
    share = torch.rand((), generator=generator, dtype=torch.float64)
    if drawing.distribution == "logit_normal":
        share = torch.special.ndtri(share).sigmoid()
    place = shifted(float(share), drawing.shift)
    return min(lowest + int(place * (highest - lowest)), highest - 1)


def _draw(
    key: int, shape: torch.Size, lowest: int, highest: int, null_share: float, offset: float, drawing: TimestepsConfig
) -> tuple[int, bool, Tensor]:
    generator = torch.Generator().manual_seed(key)
    timestep = draw_timestep(generator, lowest, highest, drawing)
    null = bool(torch.rand((), generator=generator) < null_share)
    noise = torch.randn(shape, generator=generator)
    if offset > 0:
        noise = noise + offset * torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator)
    return timestep, null, noise
