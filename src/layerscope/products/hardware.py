"""Whether the machine at hand has the matrix units that `matrix_units` needs."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
import sys
from pathlib import Path

from layerscope.products import openmp

_NEEDED = {"amx_tile", "amx_bf16", "amx_int8", "avx512f", "avx512bw", "avx512vl"}
# linux/arch/x86/include/uapi/asm/prctl.h: a process asks once for the registers of AMX.
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


@functools.lru_cache(maxsize=1)
def has_matrix_units() -> bool:
    """Return True where the CPU has AMX, the system lends it, and numba can compile for it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    if importlib.util.find_spec("numba") is None or not openmp.available():
        return False
    return _flags() >= _NEEDED and _asked()


@functools.lru_cache(maxsize=1)
def has_wide_vectors() -> bool:
    """Return True where the CPU is known to have vectors of 16 floats (AVX-512)."""
    return _flags() >= {"avx512f", "avx512bw", "avx512vl"}


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _asked() -> bool:
    libc = ctypes.CDLL(None)
    return libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0
