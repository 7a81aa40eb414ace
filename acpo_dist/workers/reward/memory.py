"""A batch that does not fit is halved until it does; one image that does not fit is an error of its own."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from acpo_dist.core.errors import RewardError
from acpo_dist.core.memory import is_out_of_memory

Part = TypeVar("Part")


class OutOfMemoryError(RewardError):
    """Not even a single image fits into the memory that is left."""


def in_halves(run: Callable[[int, int], Part], start: int, stop: int, *, name: str) -> list[Part]:
    """Answers of `run` for consecutive ranges that cover `start` to `stop`, halved where the memory does not last.

    Args:
        run: answers for the images from its first to before its second argument.
        name: the metric, for the message.

    Raises:
        OutOfMemoryError: one image alone does not fit.
    """
    try:
        return [run(start, stop)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    # Outside the handler: its traceback would keep the tensors of the failed attempt alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if stop - start == 1:
        raise OutOfMemoryError(f"reward `{name}`: out of memory with a single image ({reason})")
    middle = (start + stop) // 2
    return in_halves(run, start, middle, name=name) + in_halves(run, middle, stop, name=name)
