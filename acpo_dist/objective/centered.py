"""Terms of centered reward distillation (arXiv 2603.14128)."""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_KL_WEIGHT = 1e-4
"""Published weight of the KL term for the worst advantage."""


def implicit_reward(policy: Tensor, old: Tensor, target: Tensor) -> Tensor:
    """Return by how much the policy predicts a target better than the old policy, (B,), with the graph.

    mean((old - target)^2) / |old - target|_1 - mean((policy - target)^2) / |policy - target|_1; the divisors are means
    over the elements of a sample, at least 1e-5, and detached.

    Args:
        policy: output of the policy (B, ...), with the graph.
        old: output of the old policy on the same input, constant.
        target: output that denoises the input exactly.
    """

    def error(output: Tensor) -> Tensor:
        difference = (output - target.detach()).flatten(1)
        return difference.square().mean(1) / difference.detach().abs().mean(1).clamp(min=1e-5)

    return error(old.detach()) - error(policy)


def centered(values_B: Tensor, groups: Sequence[str], counted_B: Tensor) -> Tensor:
    """Return values less the mean of their group, (B,); the mean is constant.

    Args:
        values_B: values, with or without a graph.
        groups: name of each sample's group.
        counted_B: bool (B,): samples that the means are over. A group without any keeps its values.
    """
    place = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    index_B = torch.tensor([place[name] for name in groups], device=values_B.device)
    kept_B = counted_B.to(values_B.dtype)
    sums, counts = (
        values_B.new_zeros(len(place)).index_add(0, index_B, v) for v in (values_B.detach() * kept_B, kept_B)
    )
    return values_B - (sums / counts.clamp(min=1))[index_B]


def kl_weights(share_B: Tensor, weight: float, *, adaptive: bool) -> Tensor:
    """Return the weight of the KL term per sample, (B,).

    Args:
        share_B: advantages in [0, 1].
        weight: weight at 1.
        adaptive: from `LEAST_KL_WEIGHT` at 0, linear in the advantage; else `weight` for all.
    """
    if not adaptive:
        return torch.full_like(share_B, weight)
    return LEAST_KL_WEIGHT + share_B.detach() * (weight - LEAST_KL_WEIGHT)
