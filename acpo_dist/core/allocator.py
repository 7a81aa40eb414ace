"""glibc's allocator, told to keep what was freed."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEEP_BYTES = 2**31 - 1
_MMAP_BYTES = 256 * 2**20


def keep_freed_memory() -> bool:
    """Have glibc reuse blocks of up to 256 MiB that were freed, and keep up to 2 GiB of them.

    It gives blocks of 32 MiB and more, and smaller ones at the top of its heap, back to the system at once. The next
    tensor of that size then faults in every page again, which on a CPU costs as much as a small network's arithmetic.

    Returns:
        Whether it was told so: not where the C library is another, nor where MALLOC_ variables or LD_PRELOAD show that
        somebody has chosen already.
    """
    if "LD_PRELOAD" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # Arenas of other threads are made of 64 MiB heaps, which hold no such block.
    wanted = ((_M_MMAP_THRESHOLD, _MMAP_BYTES), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_ARENA_MAX, 1))
    return all([mallopt(key, value) for key, value in wanted])
