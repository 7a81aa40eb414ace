"""Both branches of classifier-free guidance in one forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from acpo_dist.algorithms.base import LateStates, Network


def both_branches(
    network: Network, late: LateStates, prompts: Sequence[str], guidance_scale: float
) -> tuple[Tensor, Tensor | None]:
    """Return the conditional output, and the unconditional output or None at guidance scale 1."""
    condition = network.encode(prompts)
    if guidance_scale == 1:
        return network.predict(late.latents, late.timesteps_B, condition), None
    joined = network.encode([""] * len(prompts)).join(condition)
    both = network.predict(torch.cat([late.latents] * 2), torch.cat([late.timesteps_B] * 2), joined)
    unconditional, conditional = both.chunk(2)
    return conditional, unconditional
