"""Memory that a training step frees and the next one takes again."""

import ctypes
import os

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory():
    """Let glibc keep the memory that is freed, for the rest of the process. Returns whether it does.

    By default glibc gives tensors above 32 MB, and the free end of its heap, back to the system. A training step on a
    CPU then takes them again page by page: BERT-base with 8 texts of 16 to 128 tokens spends 14 % more CPU time. A
    setting of the user's own, or another allocator, stays.
    """
    own = [name for name in os.environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")]
    try:
        is_glibc = os.confstr("CS_GNU_LIBC_VERSION").startswith("glibc")
    # another C library, or another system
    except (AttributeError, OSError, ValueError):
        is_glibc = False
    if own or not is_glibc:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # no tensor outside the heap, and nothing back from its end
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
