"""Images or latents of several sizes: one tensor if all have one size, otherwise a list."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Mixed = Tensor | Sequence[Tensor]
"""B images or latents: (B, C, H, W) if all have one size, else B tensors (C, H, W)."""


def gather(tensors: Sequence[Tensor]) -> Mixed:
    """Stack tensors (C, H, W) of one size; return tensors of several sizes as a list."""
    return torch.stack(list(tensors)) if len({tensor.shape for tensor in tensors}) == 1 else list(tensors)


def by_size(mixed: Mixed) -> list[tuple[list[int], Tensor]]:
    """Split by size.

    Returns:
        (indices, stacked tensors) of each size, in order of appearance.
    """
    if isinstance(mixed, Tensor):
        return [(list(range(len(mixed))), mixed)]
    rows: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(mixed):
        rows.setdefault(tensor.shape, []).append(index)
    return [(indices, torch.stack([mixed[index] for index in indices])) for indices in rows.values()]


def map_by_size(mixed: Mixed, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of a batch, (N, C, H, W) -> (N, ...), to each size, and restore the order."""
    parts = by_size(mixed)
    results = [function(part) for _, part in parts]
    if len(parts) == 1:
        return results[0]
    order = torch.tensor([index for indices, _ in parts for index in indices])
    return torch.cat(results)[order.argsort()]
