"""What the C library's allocator does with freed memory.

A training step on a CPU allocates and frees the same gigabyte again and again. glibc gives much of it back to the
kernel each time, and every page that the next step touches is a fault. Used by `mote train` and by the benches.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
_WITHOUT_LIMIT = -1  # of an unsigned number of bytes


def keep_freed_memory() -> bool:
    """Has glibc keep all freed memory for the process, for good; docs/training.md says what that gives.

    It holds for the whole process, so it is for programs to call, never for a library; as early as can be.
    returns: whether it was done; False with another C library than glibc
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return mallopt(_M_TRIM_THRESHOLD, _WITHOUT_LIMIT) == 1 and mallopt(_M_MMAP_MAX, 0) == 1
