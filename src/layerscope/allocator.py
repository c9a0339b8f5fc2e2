"""The process's memory: its peak, and what the C library does with what was freed.

Tensors that a run keeps cannot share the few warm buffers that a forward pass reuses; each is fresh
memory. Under glibc every tensor of more than 128 KiB is then mapped, faulted in page by page, and
given back to the system when it is freed, which can cost more than computing it. A process that
captures again and again is faster when it keeps freed memory for the next run.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # numbers of glibc's mallopt
LARGEST_KEPT = 32 * 2**20
"""Bytes of the largest freed memory that glibc can be told to keep."""
_NEVER = 2**31 - 1
_PAD = 64 * 2**20
# glibc's own switches: variables, and names inside GLIBC_TUNABLES.
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")
_TUNABLES = ("malloc.trim_threshold", "malloc.top_pad", "malloc.mmap_threshold")


def keep_freed_memory() -> bool:
    """Tell the C library to keep memory that tensors free, for the next ones; True if it does.

    Concerns the whole process, which then holds on to its peak memory. `layerscope.load` calls it
    when a model is on the CPU. A choice made through glibc's own environment variables
    (``MALLOC_TRIM_THRESHOLD_=131072`` gives memory back) stands; then, and wherever the C library
    is not glibc, nothing changes and the answer is False.
    """
    if not sys.platform.startswith("linux") or _chosen():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: musl has no such switch
        return False
    settings = (
        (_MMAP_THRESHOLD, LARGEST_KEPT),
        (_TRIM_THRESHOLD, _NEVER),
        (_TOP_PAD, _PAD),
    )
    kept = all(bool(mallopt(option, value)) for option, value in settings)
    _Told.to_keep = _Told.to_keep or kept
    return kept


def keeps_freed_memory() -> bool:
    """Return True where `keep_freed_memory` was called, and could do it."""
    return _Told.to_keep


class _Told:
    to_keep = False


def _chosen() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in _VARIABLES) or any(
        name in tunables for name in _TUNABLES
    )


def peak_memory_bytes() -> int | None:
    """Return the peak resident set of this process in bytes; None where it cannot be read.

    Linux's ``ru_maxrss`` begins at the peak of the process that started this one; ``VmHWM`` does
    not.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not on Linux
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
