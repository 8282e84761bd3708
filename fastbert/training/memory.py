"""Memory that a training step frees and the next one takes again."""

import ctypes
import os

# of glibc's malloc.h, and the largest threshold that it takes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = 1 << 25


def keep_freed_memory():
    """Let glibc keep the memory that is freed, for the rest of the process. Returns whether it does.

    By default glibc gives the end of its heap back as soon as it is free, and a training step on a CPU takes it again
    page by page. Tensors above 32 MB still come from the system: kept, they would leave gaps between the others. A
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
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, -1))
