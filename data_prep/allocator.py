"""What gives a worker its memory. Tokenising is malloc by two fifths, so the worker's malloc decides its speed; the ids do not depend on it.

    mimalloc   where it is installed (`pip install 'megatron-prism[fast-malloc]'`, Linux): loaded before the C library's own
    else       the C library's, which is told not to hand memory back to the system after every chunk (glibc; others stay as they are)
An allocator that LD_PRELOAD names already comes first, and stays. Owns: finding it, and its settings. Refuses nothing.
"""

import ctypes
import os
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

PRELOAD = "LD_PRELOAD"
PACKAGE, LIBRARY = "cmeel-mimalloc", "cmeel.prefix/lib/libmimalloc.so"
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""glibc's names for mallopt, in <malloc.h>."""
KEPT_BYTES = 64 << 20
"""Free memory that a worker keeps, above what a chunk needs and below what one huge document does."""
LARGEST_FROM_HEAP_BYTES = 32 << 20
"""Larger blocks come from the system one by one; glibc allows no more."""
PAD_BYTES = 4 << 20


def environment() -> dict[str, str]:
    """Variables that give processes begun with them the faster allocator; none where it is not installed, or its path cannot be given: the loader
    takes spaces and colons for ends of names, and complains of each part in every process."""
    path = _mimalloc() if sys.platform == "linux" else None
    if path is None or any(sign in path for sign in " :"):
        return {}
    before = os.environ.get(PRELOAD)
    return {PRELOAD: path if before is None else f"{before}:{path}"}


def what_is_missing() -> str | None:
    """For people: what workers could have; None where they have mimalloc, or LD_PRELOAD names an allocator, or there is none for the system."""
    if sys.platform != "linux" or os.environ.get(PRELOAD) or environment():
        return None
    remedy = "pip install 'megatron-prism[fast-malloc]'" if _mimalloc() is None else "its path holds a space or a colon, which the loader would cut"
    return f"workers use the C library's malloc; with mimalloc they take about 0.6 of the time: {remedy}"


def _mimalloc() -> str | None:
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(LIBRARY)))
    except metadata.PackageNotFoundError:
        return None
    return str(path) if path.exists() else None


def keep_memory() -> None:
    """Tell this process's malloc to keep what it frees. Where mimalloc is loaded, it changes nothing."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # a C library without mallopt
            mallopt = ctypes.CDLL(None).mallopt
            for name, value in ((M_TRIM_THRESHOLD, KEPT_BYTES), (M_MMAP_THRESHOLD, LARGEST_FROM_HEAP_BYTES), (M_TOP_PAD, PAD_BYTES)):
                mallopt(name, value)
