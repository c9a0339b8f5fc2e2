"""Float32 products on the matrix units of x86 CPUs (AMX).

Those units multiply bfloat16 numbers, sixteen times as many at a time as the vector units multiply
float32. A float32 number is the sum of three bfloat16 numbers, so that six of their nine products
make one that is as accurate as float32 (G. Henry, P. T. P. Tang and A. Heinecke, Leveraging the
bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations, 2019, section 2).

Sums are float32. With the same columns they are always taken in the same order, so that an entry
depends neither on the other rows nor on how the work is shared out; which factor gives the columns
in `product` depends on the sizes, and rounding with it. Numbers below 2 ** -126 count as zero; a
row with infinity or NaN gives NaN. Importing this module compiles its loops, or loads them from
numba's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.products import amx, openmp

_TURN, _WRITE, _READ = 0.5, 1.0, 0.5  # of a number, in about the same unit of time
_COLUMNS_BYTES = 24 << 20  # of the parts of B that are held at a time


def bound(d: int) -> float:
    """Return the largest error of a product over d entries, relative to its absolute sum.

    Every entry is rounded into its sum six times, in some order (N. J. Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, section 3.1); what is left out comes on top.
    """
    unit, roundings = 2.0**-24, 6 * (-(-d // amx.DEPTH) * amx.DEPTH) + d // amx.CHUNK
    return roundings * unit / (1 - roundings * unit) + 2.0**-20


@dataclass(frozen=True)
class Columns:
    """The columns of B, in parts, for many products with it.

    Attributes:
        count: how many.
        depth: entries of each.
        parts: the bytes; 1.5 times those of the float32 numbers, for columns in multiples of 32.
        address: of the first part, at the start of a cache line.
    """

    count: int
    depth: int
    parts: Tensor
    address: int

    @staticmethod
    def of(b: Float[Tensor, "k n"], *, threads: int = 1) -> Columns:
        """Take columns apart; one of the strides is 1."""
        depth, count = b.shape
        n_tiles = -(-count // amx.AT_ONCE) * 2
        parts = torch.empty(
            n_tiles * -(-depth // amx.DEPTH) * amx.STEP_BYTES + amx.LINE, dtype=torch.uint8
        )
        address = parts.data_ptr() + -parts.data_ptr() % amx.LINE
        task = np.zeros(amx.FIELDS, np.int64)
        task[[amx.B, amx.B_COLUMN, amx.B_ENTRY]] = b.data_ptr(), 4 * b.stride(1), 4 * b.stride(0)
        task[[amx.N_COLUMNS, amx.N_ENTRIES, amx.PACKED]] = count, depth, address
        _run(amx.pack_columns, amx.pack_columns_at, task, threads)
        return Columns(count, depth, parts, address)

    def multiply(
        self, a: Float[Tensor, "m k"], out: Float[Tensor, "m n"], *, threads: int = 1
    ) -> None:
        """Write ``a @ b``; one of the strides of `a`, and of `out`, is 1."""
        task = np.zeros(amx.FIELDS, np.int64)
        n_rows = len(a)
        task[[amx.A, amx.A_ROW, amx.A_ENTRY]] = a.data_ptr(), 4 * a.stride(0), 4 * a.stride(1)
        task[[amx.OUT, amx.OUT_ROW, amx.OUT_COLUMN]] = (
            out.data_ptr(),
            4 * out.stride(0),
            4 * out.stride(1),
        )
        task[[amx.N_ROWS, amx.N_COLUMNS, amx.N_ENTRIES]] = n_rows, self.count, self.depth
        task[[amx.PACKED, amx.PANEL_ROWS]] = self.address, _panel(n_rows, threads)
        _run(amx.multiply_rows, amx.multiply_rows_at, task, threads)


def _run(loop: Callable[[amx.Longs], None], address: int, task: amx.Longs, threads: int) -> None:
    if threads == 1:
        loop(task)
    else:
        openmp.run(address, task.ctypes.data, threads=threads)


def _panel(n_rows: int, threads: int) -> int:
    """Return how many rows a thread takes at a time: a few times for each, and in full blocks."""
    return min(-(-n_rows // (3 * threads * amx.AT_ONCE)) * amx.AT_ONCE, amx.PANEL)


def _work(a: Tensor, b: Tensor, threads: int) -> float:
    """Return what it takes to bring the numbers of ``a @ b`` to where they are multiplied.

    Rows want their entries side by side, columns theirs apart; what comes otherwise is turned. The
    parts of rows stay in the cache, those of columns are written once and read by every panel.
    """
    turned = a.numel() * (a.stride(1) != 1) + b.numel() * (b.stride(0) == 1)
    n_panels = len(a) / _panel(len(a), threads)
    return _TURN * turned + b.numel() * (_WRITE + _READ * n_panels)


def product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """Return ``a @ b``, computed on all of torch's threads."""
    a, b = (each if 1 in each.stride() else each.contiguous() for each in (a, b))
    out = a.new_empty(len(a), b.shape[1])
    threads = torch.get_num_threads()
    if _work(b.T, a.T, threads) + _TURN * out.numel() < _work(a, b, threads):
        left, right, target = b.T, a.T, out.T
    else:
        left, right, target = a, b, out
    step = max(amx.AT_ONCE, _COLUMNS_BYTES // (6 * right.shape[0]) // amx.AT_ONCE * amx.AT_ONCE)
    for first in range(0, right.shape[1], step):
        some = slice(first, first + step)
        Columns.of(right[:, some], threads=threads).multiply(left, target[:, some], threads=threads)
    return out
