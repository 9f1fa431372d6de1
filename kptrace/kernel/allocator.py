# SPDX-License-Identifier: Apache-2.0
"""The C library's allocator, told to give memory back: what is read at the start is many times what is kept."""

import ctypes
from typing import Final

#: `M_ARENA_MAX` and `M_TRIM_THRESHOLD` of glibc's <malloc.h>.
_ARENA_MAX: Final = -8
_TRIM_THRESHOLD: Final = -1
_TRIM_BYTES: Final = 1 << 17


def give_memory_back() -> bool:
    """One arena for all threads, and its end returned to the kernel at once; false where the C library has no such knobs.

    glibc makes an arena for each of the first threads, and keeps in each what the largest moment took. Python's threads
    take turns anyway, so they do not fight for one. To be called before there are threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_ARENA_MAX, 1)) and bool(mallopt(_TRIM_THRESHOLD, _TRIM_BYTES))
