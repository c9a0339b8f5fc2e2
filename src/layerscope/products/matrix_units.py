"""Float32 products on the matrix units of x86 CPUs (AMX).

Those units multiply bfloat16 numbers, sixteen times as many at a time as the vector units multiply
float32. A float32 number is the sum of three bfloat16 numbers, so that six of their nine products
make one that is as accurate as float32 (G. Henry, P. T. P. Tang and A. Heinecke, Leveraging the
bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations, 2019, section 2).

Sums are float32 and always taken in the same order, so that an entry depends neither on the other
rows and columns nor on how the work is shared out. Numbers below 2 ** -126 count as zero; a
row with infinity or NaN gives NaN. Importing this module compiles its loops, or loads them from
numba's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.products import amx, openmp
from layerscope.products.weights import keeps, kept

_WRITE, _READ = 1.0, 0.5  # of a number, in about the same unit of time
_FEWEST_PANELS = 3  # of a thread, for one may be kept from its core
_PARTS_BYTES = 24 << 20  # of the parts of a factor that are held at a time


def bound(d: int) -> float:
    """Return the largest error of a product over d entries, relative to its absolute sum.

    Every entry is rounded into its sum six times, in some order (N. J. Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, section 3.1); what is left out comes on top. A bias is
    where sums start; it counts as a part of the absolute sum.
    """
    unit, roundings = 2.0**-24, 6 * (-(-d // amx.DEPTH) * amx.DEPTH)
    return roundings * unit / (1 - roundings * unit) + 2.0**-20


@dataclass(frozen=True)
class _Packed:
    """One factor in parts, for many products with it.

    Attributes:
        count: how many vectors.
        depth: entries of each.
        parts: the bytes; 1.5 times those of the float32 numbers, for counts in multiples of 32.
        address: of the first part, at the start of a cache line.
    """

    count: int
    depth: int
    parts: Tensor
    address: int


class Columns(_Packed):
    """The columns of B."""

    @staticmethod
    def of(b: Float[Tensor, "k n"], *, threads: int = 1) -> Columns:
        """Take columns apart; one of the strides is 1."""
        task, parts = _to_pack(b.shape[1], len(b))
        task[[amx.B, amx.B_COLUMN, amx.B_ENTRY]] = b.data_ptr(), 4 * b.stride(1), 4 * b.stride(0)
        task[[amx.N_COLUMNS, amx.COLUMNS_PACKED]] = b.shape[1], 1
        _run(amx.pack, amx.pack_at, task, threads)
        return Columns(b.shape[1], len(b), parts, int(task[amx.PACKED]))

    def multiply(
        self,
        a: Float[Tensor, "m k"],
        out: Float[Tensor, "m n"],
        *,
        bias: Float[Tensor, " n"] | None = None,
        threads: int = 1,
    ) -> None:
        """Write ``a @ b``, on top of a bias; one of the strides of `a`, and of `out`, is 1.

        A bias goes only with an `out` whose rows lie side by side.
        """
        task = _to_multiply(self, out, bias)
        task[[amx.A, amx.A_ROW, amx.A_ENTRY]] = a.data_ptr(), 4 * a.stride(0), 4 * a.stride(1)
        task[[amx.COLUMNS_PACKED, amx.N_PANELS]] = 1, _panels(len(a), threads)
        _run(amx.multiply, amx.multiply_at, task, threads)


class Rows(_Packed):
    """The rows of A."""

    @staticmethod
    def of(a: Float[Tensor, "m k"], *, threads: int = 1) -> Rows:
        """Take rows apart; one of the strides is 1."""
        count, depth = a.shape
        task, parts = _to_pack(count, depth)
        task[[amx.A, amx.A_ROW, amx.A_ENTRY]] = a.data_ptr(), 4 * a.stride(0), 4 * a.stride(1)
        task[amx.N_ROWS] = count
        _run(amx.pack, amx.pack_at, task, threads)
        return Rows(count, depth, parts, int(task[amx.PACKED]))

    def multiply(
        self,
        b: Float[Tensor, "k n"],
        out: Float[Tensor, "m n"],
        *,
        bias: Float[Tensor, " n"] | None = None,
        threads: int = 1,
    ) -> None:
        """Do what `Columns.multiply` does."""
        task = _to_multiply(self, out, bias)
        task[[amx.B, amx.B_COLUMN, amx.B_ENTRY]] = b.data_ptr(), 4 * b.stride(1), 4 * b.stride(0)
        task[amx.N_PANELS] = _panels(b.shape[1], threads)
        _run(amx.multiply, amx.multiply_at, task, threads)


def _to_pack(count: int, depth: int) -> tuple[amx.Longs, Tensor]:
    """Return a task without its vectors, and the memory for their parts."""
    n_tiles = -(-count // amx.AT_ONCE) * 2
    parts = torch.empty(
        n_tiles * -(-depth // amx.DEPTH) * amx.STEP_BYTES + amx.LINE, dtype=torch.uint8
    )
    task = np.zeros(amx.FIELDS, np.int64)
    task[amx.PACKED] = parts.data_ptr() + -parts.data_ptr() % amx.LINE
    task[amx.N_ENTRIES] = depth
    return task, parts


def _to_multiply(packed: _Packed, out: Tensor, bias: Tensor | None) -> amx.Longs:
    """Return a task without the factor that is not packed."""
    task = np.zeros(amx.FIELDS, np.int64)
    task[[amx.OUT, amx.OUT_ROW, amx.OUT_COLUMN]] = (
        out.data_ptr(),
        4 * out.stride(0),
        4 * out.stride(1),
    )
    task[[amx.N_ROWS, amx.N_COLUMNS]] = out.shape
    task[[amx.N_ENTRIES, amx.PACKED]] = packed.depth, packed.address
    if bias is not None:
        assert out.stride(1) == 1 == bias.stride(0)
        task[amx.BIAS] = bias.data_ptr()
    return task


def _run(loop: Callable[[amx.Longs], None], address: int, task: amx.Longs, threads: int) -> None:
    if threads == 1:
        loop(task)
    else:
        openmp.run(address, task.ctypes.data, threads=threads)


def _panels(count: int, threads: int) -> int:
    """Return in how many panels threads share rows: as many for each, and a few."""
    of_each = max(-(-count // (amx.PANEL * threads)), _FEWEST_PANELS)
    return max(min(of_each * threads, -(-count // amx.AT_ONCE)), 1)


def _work(packed: Tensor, count: int, threads: int) -> float:
    """Return what it takes to bring the numbers of a packed factor to where they are multiplied.

    They are written once and read by every panel of the other factor, whose own parts stay in the
    cache of the thread that makes them.
    """
    return packed.numel() * (_WRITE + _READ * _panels(count, threads))


def product(
    a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "m n"]:
    """Return ``a @ b``, plus a bias, computed on all of torch's threads."""
    a, b = (each if 1 in each.stride() else each.contiguous() for each in (a, b))
    out = a.new_empty(len(a), b.shape[1])
    threads = torch.get_num_threads()
    at_once = _PARTS_BYTES // (6 * a.shape[1]) // amx.AT_ONCE * amx.AT_ONCE
    at_once = max(amx.AT_ONCE, at_once)
    if not keeps() and _work(a, b.shape[1], threads) < _work(b, len(a), threads):
        for some, into in zip(a.split(at_once), out.split(at_once), strict=True):
            Rows.of(some, threads=threads).multiply(b, into, bias=bias, threads=threads)
        return out
    for first in range(0, b.shape[1], at_once):
        some = slice(first, first + at_once)
        columns = kept(b, first, partial(Columns.of, b[:, some], threads=threads))
        columns.multiply(
            a, out[:, some], bias=None if bias is None else bias[some], threads=threads
        )
    return out
