"""Detection of out-of-memory errors and their conversion to `DeviceMemoryError`."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from acpo_dist.core.errors import DeviceMemoryError

_REFUSED = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, torch's CPU allocator or an accelerator ran out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU allocator raises a plain RuntimeError, with different messages on Linux and Windows.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _REFUSED)


@contextmanager
def within_memory(phase: str, remedy: str) -> Generator[None, None, None]:
    """Convert an out-of-memory error into one that names the phase and the keys to change.

    Args:
        phase: description of the block, for the message.
        remedy: settings to lower or switch on, with their keys and current values.

    Raises:
        DeviceMemoryError: the block ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeviceMemoryError(
            f"out of memory in {phase} ({reason}). {remedy} Saved files are intact: `acpo train ... --resume auto` "
            "continues from the newest checkpoint. `acpo plan` shows the memory of each role."
        ) from error
