"""Compile the Triton kernels that a call launches, many at a time, before anything is timed.

A cold machine compiles each kernel for seconds, one after the other, as the launches come. Within `compiling()` a
launch hands its kernel to a pool of threads and runs nothing, so the call goes on to the next; Triton's compiler works
outside Python's lock. What was compiled lies in Triton's cache on disk, for this process and for later ones.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

from triton.runtime import _async_compile
from triton.runtime.jit import JITFunction


@contextlib.contextmanager
def compiling(threads=None):
    """Launches within compile and run nothing; at the end every kernel is compiled.

    Tensors that a kernel would have filled hold whatever was in memory, so results mean nothing. A kernel that does not
    compile is left to the real launch, which says so.
    """
    run = JITFunction.run
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        mode = _async_compile.AsyncCompileMode(pool, ignore_errors=True)

        def compile_only(self, *args, grid, warmup, **kwargs):
            # a backward runs in a thread of its own, which has not entered the mode
            token = _async_compile.active_mode.set(mode)
            try:
                return run(self, *args, grid=grid, warmup=True, **kwargs)
            finally:
                _async_compile.active_mode.reset(token)

        with mode:
            JITFunction.run = compile_only
            try:
                yield
            finally:
                JITFunction.run = run
