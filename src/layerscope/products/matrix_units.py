"""Float32 products on the matrix units of x86 CPUs (AMX).

Those units multiply bfloat16 numbers, sixteen times as many at a time as the vector units multiply
float32, and 8-bit integers, twice as many again. Six products of parts of the numbers make one that
is as accurate as float32, in two ways:

- A float32 number is the sum of three bfloat16 numbers, HALVES (G. Henry, P. T. P. Tang and A.
  Heinecke, Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
  Computations, 2019, section 2). Sums are float32. `bound` holds for all numbers.
- A row is 24-bit integers with one scale, these are three DIGITS of 8 bits (H. Ootomo, K. Ozaki and
  R. Yokota, DGEMM on Integer Matrix Multiplication Unit, 2024, section 3, with fewer digits). Sums
  are exact. `bound_of_digits` holds for rows whose entries are not too uneven; those with a large
  outlier are computed by halves.

An entry depends neither on how the work is shared out nor, as long as products go the same way, on
the other rows and columns. Numbers below 2 ** -126 count as zero; a row with infinity or NaN gives
nothing finite. Importing this module compiles its loops, or loads them from numba's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.products import amx_bfloat16, amx_int8, digits, openmp, tasks
from layerscope.products.compiling import Longs
from layerscope.products.instructions import AT_ONCE, LINE, SIDE
from layerscope.products.weights import keeps, kept

_WRITE, _READ = 1.0, 0.5  # of a number, in about the same unit of time
_FEWEST_PANELS = 3  # of a thread, for one may be kept from its core
_LEAST_PANEL = 128  # rows, if that leaves each thread one: fewer use what they fetch too little
_PARTS_BYTES = 24 << 20  # of the parts of a factor that are held at a time
_PANEL_BYTES = 768 << 10  # of the digits of a panel, which fit in the second cache
_SAMPLES, _MOST_UNFIT = 2, 1 / 8  # groups of 16 rows that are looked at; above it, halves
_FEW = 32  # rows, below which torch is faster


@dataclass(frozen=True)
class Kind:
    """A kind of parts, and the loops for it.

    Attributes:
        depth: entries that are added up at a time.
        bytes: of the parts of a number.
        panel_bytes: of the parts that a thread takes at a time, at most.
        pack: takes a factor apart.
        pack_at: the same, for a task at an address.
        multiply: multiplies it with another.
        multiply_at: the same, for a task at an address.
    """

    depth: int
    bytes: int
    panel_bytes: int
    pack: Callable[[Longs], None]
    pack_at: int
    multiply: Callable[[Longs], None]
    multiply_at: int

    def panels(self, count: int, depth: int, threads: int) -> int:
        """Return in how many panels threads share rows: as many for each, and a few."""
        most = max(min(tasks.PANEL, self.panel_bytes // (self.bytes * depth)), AT_ONCE)
        few = min(_FEWEST_PANELS, max(count // (_LEAST_PANEL * threads), 1))
        of_each = max(-(-count // (most * threads)), few)
        return max(min(of_each * threads, -(-count // AT_ONCE)), 1)


HALVES = Kind(
    amx_bfloat16.DEPTH,
    6,
    1 << 30,  # it goes through long rows in chunks
    amx_bfloat16.pack,
    amx_bfloat16.pack_at,
    amx_bfloat16.multiply,
    amx_bfloat16.multiply_at,
)
DIGITS = Kind(
    digits.DEPTH,
    3,
    _PANEL_BYTES,
    amx_int8.pack,
    amx_int8.pack_at,
    amx_int8.multiply,
    amx_int8.multiply_at,
)


def bound(d: int) -> float:
    """Return the largest error of a product over d entries, relative to its absolute sum.

    Every entry is rounded into its sum six times, in some order (N. J. Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, section 3.1); what is left out comes on top. A bias is
    where sums start; it counts as a part of the absolute sum.
    """
    unit, roundings = 2.0**-24, 6 * (-(-d // HALVES.depth) * HALVES.depth)
    return roundings * unit / (1 - roundings * unit) + 2.0**-20


def bound_of_digits(d: int) -> float:
    """Return the largest error of digits over d entries, relative to both vectors' lengths.

    With t the unit of the last digit: every entry of one vector is off by at most t, and what is
    left out of d products is at most (2 ** 23 + 2 ** 14) t t'. The evenness that `digits` asks
    for ties t to the length of a vector: the largest entry is at most 0.4 of it in rows, and
    6 / sqrt(d) in columns. Eight roundings come on top. A bias counts as a part of the product of
    the lengths.
    """
    of_row, of_column = digits.MOST_OF_ROW**0.5, (digits.MOST_OF_COLUMN / d) ** 0.5
    off = (of_row + of_column) * d**0.5 + 1.01 * d * of_row * of_column
    return 1.01 * off / digits.LARGEST + 8 * 2.0**-24


@dataclass(frozen=True)
class _Packed:
    """One factor in parts, for many products with it.

    Attributes:
        count: how many vectors.
        depth: entries of each.
        parts: the bytes; for counts in multiples of 32, 1.5 times those of the float32 numbers for
            halves, 0.75 times for digits.
        address: of the first part, at the start of a cache line.
        kind: of the parts.
        scales: of the vectors, for digits; NaN where a vector does not fit.
        unfit: how many do not.
    """

    count: int
    depth: int
    parts: Tensor
    address: int
    kind: Kind
    scales: Float[Tensor, " count"]
    unfit: int


@dataclass(frozen=True)
class _Multiplied:
    """What is known of the factor that was taken apart on the way: as in `_Packed`."""

    scales: Float[Tensor, " count"]
    unfit: int


class Columns(_Packed):
    """The columns of B."""

    @staticmethod
    def of(b: Float[Tensor, "k n"], *, threads: int = 1, kind: Kind = HALVES) -> Columns:
        """Take columns apart; one of the strides is 1."""
        task = _with_b(b)
        task[[tasks.N_COLUMNS, tasks.COLUMNS_PACKED]] = b.shape[1], 1
        return Columns(*_pack(task, b.shape[1], len(b), tasks.COLUMN_SCALES, threads, kind))

    def multiply(
        self,
        a: Float[Tensor, "m k"],
        out: Float[Tensor, "m n"],
        *,
        bias: Float[Tensor, " n"] | None = None,
        threads: int = 1,
    ) -> _Multiplied:
        """Write ``a @ b``, on top of a bias; one of the strides of `a`, and of `out`, is 1.

        A bias goes only with an `out` whose rows lie side by side, and so do digits.
        """
        task = _with_a(a)
        task[tasks.COLUMNS_PACKED] = 1
        which = tasks.COLUMN_SCALES, tasks.ROW_SCALES
        return _multiply(self, task, len(a), out, bias, which, threads)


class Rows(_Packed):
    """The rows of A."""

    @staticmethod
    def of(a: Float[Tensor, "m k"], *, threads: int = 1, kind: Kind = HALVES) -> Rows:
        """Take rows apart; one of the strides is 1."""
        task = _with_a(a)
        task[tasks.N_ROWS] = len(a)
        return Rows(*_pack(task, len(a), a.shape[1], tasks.ROW_SCALES, threads, kind))

    def multiply(
        self,
        b: Float[Tensor, "k n"],
        out: Float[Tensor, "m n"],
        *,
        bias: Float[Tensor, " n"] | None = None,
        threads: int = 1,
    ) -> _Multiplied:
        """Do what `Columns.multiply` does."""
        which = tasks.ROW_SCALES, tasks.COLUMN_SCALES
        return _multiply(self, _with_b(b), b.shape[1], out, bias, which, threads)


def _with_a(a: Tensor) -> Longs:
    task = np.zeros(tasks.FIELDS, np.int64)
    fields = [tasks.A, tasks.A_ROW, tasks.A_ENTRY]
    task[fields] = a.data_ptr(), 4 * a.stride(0), 4 * a.stride(1)
    return task


def _with_b(b: Tensor) -> Longs:
    task = np.zeros(tasks.FIELDS, np.int64)
    fields = [tasks.B, tasks.B_COLUMN, tasks.B_ENTRY]
    task[fields] = b.data_ptr(), 4 * b.stride(1), 4 * b.stride(0)
    return task


def _pack(
    task: Longs, count: int, depth: int, scales_at: int, threads: int, kind: Kind
) -> tuple[int, int, Tensor, int, Kind, Tensor, int]:
    """Return the fields of `_Packed` for the factor that a task names."""
    n_tiles, n_steps = -(-count // AT_ONCE) * 2, -(-depth // kind.depth)
    size = n_tiles * n_steps * SIDE * kind.depth * kind.bytes
    parts, scales = torch.empty(size + LINE, dtype=torch.uint8), torch.empty(count)
    address = parts.data_ptr() + -parts.data_ptr() % LINE
    task[[tasks.PACKED, tasks.N_ENTRIES]] = address, depth
    task[scales_at] = scales.data_ptr()
    _run(kind.pack, kind.pack_at, task, threads)
    return count, depth, parts, address, kind, scales, int(task[tasks.UNFIT])


def _multiply(
    packed: _Packed,
    task: Longs,
    count: int,
    out: Tensor,
    bias: Tensor | None,
    scales_at: tuple[int, int],
    threads: int,
) -> _Multiplied:
    """Multiply with the factor that a task names, which has so many vectors."""
    kind, scales = packed.kind, torch.empty(count)
    fields = [tasks.OUT, tasks.OUT_ROW, tasks.OUT_COLUMN]
    task[fields] = out.data_ptr(), 4 * out.stride(0), 4 * out.stride(1)
    task[[tasks.N_ROWS, tasks.N_COLUMNS]] = out.shape
    task[[tasks.N_ENTRIES, tasks.PACKED]] = packed.depth, packed.address
    task[list(scales_at)] = packed.scales.data_ptr(), scales.data_ptr()
    task[tasks.N_PANELS] = kind.panels(count, packed.depth, threads)
    assert out.stride(1) == 1 or (kind is HALVES and bias is None)
    if bias is not None:
        assert bias.stride(0) == 1
        task[tasks.BIAS] = bias.data_ptr()
    _run(kind.multiply, kind.multiply_at, task, threads)
    return _Multiplied(scales, int(task[tasks.UNFIT]))


def _run(loop: Callable[[Longs], None], address: int, task: Longs, threads: int) -> None:
    if threads == 1:
        loop(task)
    else:
        openmp.run(address, task.ctypes.data, threads=threads)


def _work(packed: Tensor, depth: int, count: int, kind: Kind, threads: int) -> float:
    """Return what it takes to bring the numbers of a packed factor to where they are multiplied.

    They are written once and read by every panel of the other factor, whose own parts stay in the
    cache of the thread that makes them.
    """
    return packed.numel() * (_WRITE + _READ * kind.panels(count, depth, threads))


def product(
    a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "m n"]:
    """Return ``a @ b``, plus a bias, computed on all of torch's threads."""
    a, b = (each if 1 in each.stride() else each.contiguous() for each in (a, b))
    out = a.new_empty(len(a), b.shape[1])
    if not (_is_even(a, 0) and _is_even(b.T, 1)):
        _write_product(a, b, bias, out, HALVES)
        return out
    rows, columns = _write_product(a, b, bias, out, DIGITS)
    if rows is not None:
        out[rows] = _by_halves(a[rows], b, bias)
    if columns is not None:
        out[:, columns] = _by_halves(a, b[:, columns], None if bias is None else bias[columns])
    return out


class Slices:
    """Vectors that are multiplied with a weight slice by slice, in any thread."""

    def __init__(
        self, vectors: Float[Tensor, "slot d_model"], weight: Float[Tensor, "vocab d_model"]
    ) -> None:
        """Take vectors apart; entries of a weight's row lie side by side."""
        self._vectors = vectors
        self._columns: Columns | None = None
        self._uneven: Tensor | None = None
        if _is_even(vectors, 0) and _is_even(weight, 1):
            self._rows = Rows.of(vectors, kind=DIGITS)
            self._uneven = _unfit([self._rows])
            if self._uneven is None or len(self._uneven) < _FEW:
                return
        self._columns = Columns.of(vectors.T)

    def multiply(
        self, part: Float[Tensor, "token d_model"], out: Float[Tensor, "slot token"]
    ) -> None:
        """Write the products with some rows of the weight, on the calling thread."""
        if self._columns is not None:
            self._columns.multiply(part, out.T)
            return
        tokens = _unfit([self._rows.multiply(part.T, out)])
        if tokens is not None:
            out[:, tokens] = self._vectors @ part[tokens].T
        if self._uneven is not None:
            out[self._uneven] = self._vectors[self._uneven] @ part.T


def _is_even(vectors: Tensor, is_column: int) -> bool:
    """Return whether digits suit nearly all of some rows (or columns)."""
    if vectors.dtype != torch.float32:
        step = max(len(vectors) // (_SAMPLES * SIDE), 1)
        vectors = vectors[::step][: _SAMPLES * SIDE].float().contiguous()
    count, depth = vectors.shape
    if depth > digits.MOST_DEPTH:
        return False
    across, along = (4 * stride for stride in vectors.stride())
    at = vectors.data_ptr()
    unfit = amx_int8.unfit(at, across, along, count, depth, is_column, _SAMPLES)
    return unfit <= _MOST_UNFIT * _SAMPLES * min(count, SIDE)


def _by_halves(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Return a product of what digits do not suit, often of a few rows."""
    out = a.new_empty(len(a), b.shape[1])
    if min(out.shape) < _FEW:
        torch.mm(a, b, out=out)
        return out if bias is None else out.add_(bias)
    _write_product(a, b, bias, out, HALVES)
    return out


def _write_product(
    a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, kind: Kind
) -> tuple[Tensor | None, Tensor | None]:
    """Write ``a @ b``, plus a bias; return which rows, and which columns, are still missing."""
    threads, depth = torch.get_num_threads(), a.shape[1]
    at_once = max(_PARTS_BYTES // (kind.bytes * depth) // AT_ONCE * AT_ONCE, AT_ONCE)
    done: list[tuple[_Multiplied | _Packed, _Multiplied | _Packed]] = []
    of_a, of_b = _work(a, depth, b.shape[1], kind, threads), _work(b, depth, len(a), kind, threads)
    if not keeps() and of_a < of_b:
        for some, into in zip(a.split(at_once), out.split(at_once), strict=True):
            rows = Rows.of(some, threads=threads, kind=kind)
            done.append((rows, rows.multiply(b, into, bias=bias, threads=threads)))
        return _unfit([rows for rows, _ in done]), _unfit([done[0][1]])
    for first in range(0, b.shape[1], at_once):
        some = slice(first, first + at_once)
        make = partial(Columns.of, b[:, some], threads=threads, kind=kind)
        columns = kept(b, (first, kind is DIGITS), make)
        mine = None if bias is None else bias[some]
        done.append((columns.multiply(a, out[:, some], bias=mine, threads=threads), columns))
    return _unfit([done[0][0]]), _unfit([columns for _, columns in done])


def _unfit(found: list[_Multiplied | _Packed]) -> Tensor | None:
    """Return the numbers of those that do not fit, if there are any."""
    if not any(each.unfit for each in found):
        return None
    return torch.cat([each.scales for each in found]).isnan().nonzero()[:, 0]
