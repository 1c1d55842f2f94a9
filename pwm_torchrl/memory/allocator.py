"""Making the C library give memory back.

glibc takes allocations above a threshold straight from the kernel, and gives them back when they are freed. It raises
that threshold, up to 32 MiB, with every such block that is freed, and what lies below it comes from a heap in which
PyTorch's aligned blocks leave holes that none of the same size fits into: a world-model update that recomputes its
substeps was seen to hold four times the memory that was alive. With a fixed threshold the memory held is the memory in
use, which is also what can be predicted.
"""

from __future__ import annotations

import ctypes

#: Blocks of at least so many bytes are given back when they are freed.
THRESHOLD = 64 * 1024
#: Below so many bytes alive, holes do not matter and small tensors gain from a heap that stays.
WORTHWHILE = 128 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def return_freed_memory() -> bool:
    """Fix the threshold for the rest of this process; False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, WORTHWHILE))
