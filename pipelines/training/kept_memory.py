"""Freed memory stays with the process, on the CPU: a step of training then writes where the last one did. Called by `fit`.

glibc hands large blocks back to the system as they are freed, and the next step waits while gigabytes of new pages are zeroed
(docs/TRAINING.md has figures). It costs peak memory, for holes are not always of the size that is asked for next; less
with one arena for all threads, where the backward pass, a thread of its own, finds what the forward pass freed.
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
NEVER = -1


def keep_freed_memory() -> bool:
    """From now on this process returns no memory to the system before it ends; says whether it does so. Only with glibc's malloc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    return all([set_option(M_MMAP_MAX, 0), set_option(M_TRIM_THRESHOLD, NEVER), set_option(M_ARENA_MAX, 1)])
