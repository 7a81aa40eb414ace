"""When glibc's allocator keeps freed memory in the process, and when it returns it."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEEP_BYTES = 2**31 - 1
_MMAP_BYTES = 256 * 2**20


def keep_freed_memory() -> bool:
    """Make glibc reuse freed blocks of up to 256 MiB, and keep up to 2 GiB of them.

    By default glibc returns blocks of 32 MiB and more, and smaller ones at the top of its heap, to the system at once.
    The next tensor of that size faults in every page again, which on a CPU costs as much as a small network's
    arithmetic.

    Returns:
        Whether the settings were applied. They are not applied with another C library, or if MALLOC_ variables or
        LD_PRELOAD already configure the allocator.
    """
    if "LD_PRELOAD" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # Arenas of other threads consist of 64 MiB heaps, which are too small for such blocks.
    wanted = ((_M_MMAP_THRESHOLD, _MMAP_BYTES), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_ARENA_MAX, 1))
    return all([mallopt(key, value) for key, value in wanted])


def return_freed_memory() -> None:
    """Give all freed blocks back to the system, after weights were loaded or released; nothing with another C library.

    Copies of the weights in the file's type, and those of a model that was replaced, are not needed again.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return
