"""Reward gradient through the last sampler steps: deterministic DDIM with recomputation in the backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from acpo_dist.algorithms.base import LateStates, MicroBatch, Network, TailStates
from acpo_dist.algorithms.branches import both_branches
from acpo_dist.core.seeding import derive_seed
from acpo_dist.diffusion.prediction import add_noise
from acpo_dist.diffusion.sampling import ddim_step, guide
from acpo_dist.diffusion.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class SampledTail:
    """Result of K sampler steps with their intermediate states."""

    clean: Tensor
    """x_0 (B, C, H, W), with the graph of all K steps."""
    states: tuple[Tensor, ...]
    """x before each step, detached."""
    outputs: tuple[Tensor, Tensor | None]
    """Conditional and null output of the first step, with the graph."""


def sample_tail(
    network: Network, tail: TailStates, prompts: Sequence[str], guidance_scale: float, rescale: float = 0.0
) -> SampledTail:
    """Sample the last K steps with gradients through all of them.

    For K > 1 each network call runs again in the backward pass, so memory holds the graph of one call for any K.

    Args:
        network: the policy.
        tail: states and levels.
        prompts: one per sample.
        guidance_scale: guidance scale of the rollouts; 1 runs only the conditional branch.
        rescale: `sampler.guidance_rescale`.

    Source: DRaFT (Clark et al. 2023) and AlignProp (Prabhudesai et al. 2023).
    """
    trajectory, state = tail.trajectory, tail.latents
    recompute = trajectory.num_steps > 1 and torch.is_grad_enabled()
    states: list[Tensor] = []
    first: tuple[Tensor, Tensor | None] | None = None
    for step in range(trajectory.num_steps):
        level, following = trajectory.alpha_bars[step : step + 2]

        def forward(noisy: Tensor, step: int = step) -> tuple[Tensor, Tensor | None]:
            return both_branches(network, states_at(noisy, trajectory, step), prompts, guidance_scale)

        states.append(state.detach())
        outputs = checkpoint(forward, state, use_reentrant=False) if recompute else forward(state)
        conditional, null = outputs
        first = first or (conditional, null)
        guided = conditional if null is None else guide(conditional, null, guidance_scale, rescale)
        kind = network.prediction_type
        guided = network.clean_rule.apply(guided, state, states_at(state, trajectory, step).alpha_bars_B, kind)
        state = ddim_step(guided, state, level, following, kind)
    assert first is not None, "a trajectory has at least one step"
    return SampledTail(clean=state, states=tuple(states), outputs=first)


def states_at(noisy: Tensor, trajectory: Trajectory, step: int) -> LateStates:
    """Return states (B, C, H, W) with the level of one step of a trajectory."""
    size, device = len(noisy), noisy.device
    return LateStates(
        latents=noisy, timesteps_B=torch.full((size,), trajectory.timesteps[step], device=device),
        alpha_bars_B=torch.full((size,), trajectory.alpha_bars[step], dtype=torch.float64, device=device),
    )  # fmt: skip


def passed_states(sampled: SampledTail, tail: TailStates, noise_keys: Sequence[int]) -> LateStates:
    """Return one of the K intermediate states of each sample, selected uniformly by the sample's key."""
    trajectory = tail.trajectory
    steps = [(key >> 32) % trajectory.num_steps for key in noise_keys]
    device = tail.latents.device
    return LateStates(
        latents=torch.stack([sampled.states[step][row] for row, step in enumerate(steps)]),
        timesteps_B=torch.tensor([trajectory.timesteps[step] for step in steps], device=device),
        alpha_bars_B=torch.tensor([trajectory.alpha_bars[step] for step in steps], dtype=torch.float64, device=device),
    )


def low_variance_tail(batch: MicroBatch, tail: TailStates, count: int) -> TailStates:
    """Return `count` states per sample before the last step, noised from x_0: all first draws, then all second ones.

    Source: DRaFT-LV (Clark et al. 2023), section 4.
    """
    trajectory = tail.trajectory
    level = torch.full((len(batch.clean),), trajectory.alpha_bars[-2], dtype=torch.float64, device=batch.clean.device)
    draws: list[Tensor] = []
    for index in range(count):
        seeds = [derive_seed("low variance", key, index) for key in batch.noise_keys]
        noise = [torch.randn(batch.clean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        draws.append(add_noise(batch.clean, torch.stack(noise).to(batch.clean), level))
    last = Trajectory(timesteps=trajectory.timesteps[-1:], alpha_bars=trajectory.alpha_bars[-2:])
    return TailStates(latents=torch.cat(draws), trajectory=last)
