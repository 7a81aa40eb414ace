"""Halve a batch until it fits into memory."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from acpo_dist.core.errors import RewardError
from acpo_dist.core.memory import is_out_of_memory

Part = TypeVar("Part")


class OutOfMemoryError(RewardError):
    """A single image does not fit into the free memory."""


def in_halves(run: Callable[[int, int], Part], start: int, stop: int, *, name: str) -> list[Part]:
    """Return results of `run` for consecutive ranges that cover `start` to `stop`, halved if memory runs out.

    Args:
        run: (start, stop) -> result for these images.
        start: first image.
        stop: end of the range, exclusive.
        name: the metric, for the message.

    Raises:
        OutOfMemoryError: a single image does not fit.
    """
    try:
        return [run(start, stop)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    # Outside the handler, whose traceback would keep the tensors of the failed attempt alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if stop - start == 1:
        raise OutOfMemoryError(f"reward `{name}`: out of memory with a single image ({reason})")
    middle = (start + stop) // 2
    return in_halves(run, start, middle, name=name) + in_halves(run, middle, stop, name=name)
