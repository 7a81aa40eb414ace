"""Chunks of whole prompt groups, independent of the number of workers."""

from collections.abc import Sequence

from torch import Tensor

from acpo_dist.core.by_size import Mixed, gather
from acpo_dist.core.sizes import Size
from acpo_dist.core.types import PromptGroup, SamplePlan


def group_chunks(groups: Sequence[PromptGroup], batch_size: int) -> list[list[PromptGroup]]:
    """Join groups of one size to chunks of up to `batch_size` samples; a larger group is a chunk of its own.

    Sizes follow in order of appearance, and the groups of one size keep their order.
    """
    chunks: dict[Size | None, list[list[PromptGroup]]] = {}
    for group in groups:
        own = chunks.setdefault(group.samples[0].size, [])
        if own and sum(len(other.samples) for other in own[-1]) + len(group.samples) <= batch_size:
            own[-1].append(group)
        else:
            own.append([group])
    return [chunk for own in chunks.values() for chunk in own]


def chunks_of(groups: Sequence[PromptGroup], batch_size: int) -> list[tuple[SamplePlan, ...]]:
    """Return the samples of the chunks of `group_chunks`."""
    return [tuple(plan for group in chunk for plan in group.samples) for chunk in group_chunks(groups, batch_size)]


def in_order(groups: Sequence[PromptGroup], chunks: Sequence[Sequence[SamplePlan]], latents: Sequence[Tensor]) -> Mixed:
    """Return the latents of all chunks in the order of the groups' samples."""
    at = {
        plan.sample_id: row
        for chunk, part in zip(chunks, latents, strict=True)
        for plan, row in zip(chunk, part, strict=True)
    }
    return gather([at[plan.sample_id] for group in groups for plan in group.samples])
