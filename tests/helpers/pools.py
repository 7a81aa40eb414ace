"""Requests for a reward pool on Ray, and a wait for changes of its cluster."""

import time
from collections.abc import Callable

import torch

from acpo_dist.core.types import RolloutHandle

IMAGES = 3
"""Images of one request."""


def images(seed: int, count: int = IMAGES, size: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, size, size, generator=generator) * 255).to(torch.uint8)


def until(condition: Callable[[], bool], *, within_s: float = 300.0) -> None:
    """Wait for a condition of the cluster that has no notification; the limit is for a busy machine."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.1)


def handle_of(cluster, index: int, images: torch.Tensor) -> RolloutHandle:
    # A copy: a part of a larger tensor would travel with all of it.
    return RolloutHandle(
        sample_ids=tuple(f"{index}/{row}" for row in range(len(images))), prompts=("",) * len(images),
        policy_version=0, schedule_id="", payload=(None, cluster.put(images.clone())),
    )  # fmt: skip
