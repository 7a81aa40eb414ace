"""Running out of memory, told apart from other errors and said in words that help."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from acpo_dist.core.errors import DeviceMemoryError

_REFUSED = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's CPU allocator or an accelerator ran out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU allocator raises a plain RuntimeError, in other words on Linux than on Windows.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _REFUSED)


@contextmanager
def within_memory(phase: str, remedy: str) -> Generator[None, None, None]:
    """Turn the allocator's error into one that says what was being done and which keys to change.

    Args:
        phase: what runs inside, for the message.
        remedy: what to lower or switch on, with its keys and present values.

    Raises:
        DeviceMemoryError: the memory did not last.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeviceMemoryError(
            f"out of memory in {phase} ({reason}). {remedy} Nothing that was saved is lost: the newest checkpoint is "
            "whole, and `acpo train ... --resume auto` goes on from it. `acpo plan` shows what each role needs."
        ) from error
