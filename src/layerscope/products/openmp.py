"""Loops of our own on the threads that torch already has.

Threads that torch starts for an operation keep their cores busy for a while after it. Others beside
them would have to share these cores, so torch's own are asked, by the interface of its OpenMP.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CALLED = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.lru_cache(maxsize=1)
def _parallel() -> Callable[..., Any] | None:
    """Return ``GOMP_parallel`` of the OpenMP that torch is linked with; LLVM's and Intel's have it.

    Other packages bring an OpenMP of their own: only what torch itself depends on is searched.
    """
    found = list((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so"))
    try:
        function = ctypes.CDLL(str(found[0])).GOMP_parallel
    except (IndexError, OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def available() -> bool:
    """Return True where torch's threads can be asked."""
    return _parallel() is not None


def run(callback: int, argument: int, *, threads: int) -> None:
    """Call ``callback(argument)`` in so many threads at once, and wait for all."""
    function = _parallel()
    assert function is not None
    function(callback, argument, threads, 0)


def call(work: Callable[[], None], *, threads: int) -> None:
    """Call a Python function in so many threads at once, and wait for all.

    The calling thread is one of them. `work` must not raise: nobody could pass that on.
    """

    def without_argument(_argument: int | None) -> None:
        work()

    told = _CALLED(without_argument)
    address = ctypes.cast(told, ctypes.c_void_p).value
    assert address is not None
    run(address, 0, threads=threads)
