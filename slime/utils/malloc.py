"""The C library's allocator, told to keep what a tensor freed for the next one."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_KEPT_BYTES = (1 << 31) - 1
_MMAP_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Has glibc hand freed memory out again instead of giving it back to the system; whether it could be told.

    By default a tensor of some megabytes is mapped, zeroed by the kernel page by page as it is written, and unmapped,
    for every operation: a fifth of the time of a small model's forward pass. What a process holds at its peak does not
    change. Source: mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
