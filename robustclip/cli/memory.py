"""Keeps freed memory in the process, so that a layer does not wait for new pages.

The C library of most Linux systems, glibc, asks the system for a block as large as a batch's activations, and gives it
back when it is freed. Every layer on a CPU then waits for pages that the system fills with zeros, for longer than it
computes in a small network (benchmarks/README.md, "Memory of a CPU run").
"""

import ctypes
import os
import sys

# Numbers of parameters in glibc's malloc.h, see mallopt(3).
TRIM_THRESHOLD, MMAP_MAX = -1, -4
VARIABLES = "MALLOC_"  # prefix of glibc's environment variables
LARGEST = 2**31 - 1  # bytes: the largest threshold that mallopt takes


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory that a process frees, and use it again, for the life of the process.

    Returns:
        Whether it does: no if the user has set one of glibc's variables, or the C library is another one.
    """
    if sys.platform != "linux" or any(name.startswith(VARIABLES) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, LARGEST))
