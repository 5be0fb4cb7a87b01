"""What a worker on a CPU does with memory that it no longer uses."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_NEVER = -1
_LARGEST_IN_HEAP = 1 << 30


def keep_freed_memory() -> bool:
    """Makes glibc keep large buffers for the next step instead of giving them back to the system; False where there is none.

    Every step of a learner needs the same buffers again, and the system zeroes each page that it hands out anew: a third of
    SmolLM2's step on two cores. The process stays at its peak.
    """
    if sys.platform != "linux" or (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
