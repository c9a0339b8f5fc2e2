"""How loops of our own are compiled: by numba, without the interpreter lock, kept on the disk.

numba finds a loop on the disk by its name and by the age of the file that it is in. A loop also
contains what it calls, from other files; so its name carries a stamp of all that these say.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

ir: Any = importlib.import_module("llvmlite.ir")
Longs = NDArray[np.int64]
_CALLBACKS: list[Any] = []  # what C may call must not be collected
Loop = TypeVar("Loop", bound=Callable[..., Any])


def _stamp(loop: Callable[..., Any]) -> None:
    """Put what a loop may be made of into its name."""
    folders = {Path(loop.__code__.co_filename).parent, Path(__file__).parent}
    loop.__qualname__ += f"_{_digest(frozenset(folders))}"


@functools.lru_cache(maxsize=8)
def _digest(folders: frozenset[Path]) -> str:
    """Return a few letters that differ as soon as any file of ours in these folders does."""
    found = hashlib.blake2b(digest_size=4)
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def compiled(
    signature: str | None = None, *, fastmath: set[str], inline: bool = False
) -> Callable[[Loop], Loop]:
    """Compile a loop that runs without the interpreter lock, and keep it on disk if that can be."""

    def compile_it(loop: Loop) -> Loop:
        # Divisions by zero give infinity or NaN: a check of each would keep them out of registers.
        options = {
            "nogil": True,
            "fastmath": fastmath,
            "forceinline": inline,
            "error_model": "numpy",
        }
        make = cast("Callable[..., Callable[[Loop], Loop]]", numba.njit)
        _stamp(loop)
        try:
            return make(signature, cache=True, **options)(loop)
        except (RuntimeError, OSError):  # no folder that could be written to
            return make(signature, **options)(loop)

    return compile_it


def callback(signature: str) -> Callable[[Callable[..., None]], int]:
    """Compile a loop for callers in C, and return its address."""

    def compile_it(loop: Callable[..., None]) -> int:
        make = cast("Callable[..., Callable[[Any], Any]]", numba.cfunc)
        _stamp(loop)
        try:
            found = make(signature, cache=True)(loop)
        except (RuntimeError, OSError):  # no folder that could be written to
            found = make(signature)(loop)
        _CALLBACKS.append(found)
        return int(found.address)

    return compile_it


def _added(builder: Any, given: Any) -> Any:
    pointer = builder.inttoptr(given[0], ir.IntType(64).as_pointer())
    return builder.atomic_rmw("add", pointer, given[1], "monotonic")


@intrinsic
def _take(_typing: Any, counter: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Return the counter and add one to it, whoever else does so at the same time."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return _added(builder, (*given, ir.IntType(64)(1)))

    return types.int64(types.int64), generate


@intrinsic
def _add(_typing: Any, counter: Any, number: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Add a number to the counter, and return what it was before."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return _added(builder, given)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _longs_at(_typing: Any, address: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Return an address as one of integers."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), generate


longs_at = cast("Callable[[int], Any]", _longs_at)
take = cast("Callable[[int], int]", _take)  # the address of a counter
add = cast("Callable[[int, int], int]", _add)
as_array = cast("Callable[..., Longs]", vars(numba)["carray"])
