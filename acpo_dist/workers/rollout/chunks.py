"""Chunks of whole prompt groups, independent of the number of workers."""

from collections.abc import Sequence

from acpo_dist.core.types import PromptGroup, SamplePlan


def chunks_of(groups: Sequence[PromptGroup], batch_size: int) -> list[tuple[SamplePlan, ...]]:
    """Join consecutive groups to chunks of up to `batch_size` samples; a larger group is a chunk of its own."""
    chunks: list[list[SamplePlan]] = []
    for group in groups:
        if chunks and len(chunks[-1]) + len(group.samples) <= batch_size:
            chunks[-1].extend(group.samples)
        else:
            chunks.append(list(group.samples))
    return [tuple(chunk) for chunk in chunks]
