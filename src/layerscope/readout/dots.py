"""Products of a few rows with a tall matrix, as one compiled loop.

Libraries for matrix products are made for many rows. With a few of them the matrix is read once and
hardly used, so reading it is what takes the time. Here a few rows of the matrix meet all the others
while they are in the nearest cache, and those that come next are fetched meanwhile.

Importing this module compiles the loop, or loads it from numba's cache. Everything is float32 with
fused multiply-adds where the CPU has them. An entry is a sum of `WIDTH` interleaved sums, always
in the same order, so that it does not depend on the other rows nor on how the matrix is shared
out; its error is at most ``bound(d) * sum_k |x_k w_k|``.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from layerscope.products import openmp
from layerscope.products.compiling import Longs, as_array, callback, compiled, take
from layerscope.readout.kernels import Floats

ir: Any = importlib.import_module("llvmlite.ir")


def _shape() -> tuple[int, int]:
    """Return how many floats a register holds, and how many rows of sums fit in the registers.

    Each row has `_TOKENS` sums, and `_TOKENS` more registers hold what they are multiplied with.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return 4, 6
    try:
        found = importlib.import_module("llvmlite.binding").get_host_cpu_features()
    except RuntimeError:
        found = {}
    if found.get("avx512f"):
        return 16, 7
    return (8, 3) if found.get("avx") else (4, 3)


_TOKENS = 4  # rows of the matrix at a time
WIDTH, _ROWS = _shape()
_LINE = 64  # bytes: what caches deal in
_AT_ONCE = 128 * _TOKENS  # rows of the matrix that one thread takes at a time
X, W, W_ROW, OUT, OUT_ROW, N_ROWS, N_TOKENS, N_ENTRIES, NEXT, FIELDS = range(10)  # of a task
_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_INT, _SHORT = ir.IntType(64), ir.IntType(32)


def bound(d: int) -> float:
    """Return the largest error of a product over d entries, relative to its absolute sum.

    No product goes through more roundings than its interleaved sum has entries, and one for each
    level of the tree that adds those sums (N. J. Higham, Accuracy and Stability of Numerical
    Algorithms, 2002, chapters 3 and 4).
    """
    roundings = -(-d // WIDTH) + WIDTH.bit_length() - 1
    unit = 2.0**-24
    return roundings * unit / (1 - roundings * unit)


@intrinsic
def _tile(  # pyright: ignore[reportUnusedFunction]
    _typing: Any,
    size: Any,
    x: Any,
    w: Any,
    w_stride: Any,
    rest: Any,
    whole: Any,
    steps: Any,
    out: Any,
    out_stride: Any,
    ahead: Any,
    ahead_step: Any,
) -> Any:
    """Multiply `size` rows with `_TOKENS` rows of the matrix; all arguments are integers.

    Args:
        size: how many rows, 1 to `_ROWS`.
        x: address of [step, size, WIDTH] floats: the rows, padded with zeros.
        w: address of the first row of the matrix.
        w_stride: bytes from one of its rows to the next.
        rest: address of [_TOKENS, WIDTH] floats that stand for step `whole` of the matrix.
        whole: how many steps the matrix has in full.
        steps: how many steps there are, `whole` or one more.
        out: address of the first result; those of one row lie side by side.
        out_stride: bytes from one row of results to the next.
        ahead: address of what will be needed soon; `_TOKENS` rows of it are fetched.
        ahead_step: how many bytes further at each step.
    """
    names = (size, x, w, w_stride, rest, whole, steps, out, out_stride, ahead, ahead_step)

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        after = builder.append_basic_block("after")
        cases = builder.switch(given[0], after)
        for rows in range(1, _ROWS + 1):
            block = builder.append_basic_block(f"rows.{rows}")
            cases.add_case(_INT(rows), block)
            builder.position_at_end(block)
            _write_case(builder, rows, *given[1:])
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*[types.int64 for _ in names]), generate


def _write_case(
    builder: Any,
    rows: int,
    x: Any,
    w: Any,
    w_stride: Any,
    rest: Any,
    whole: Any,
    steps: Any,
    out: Any,
    out_stride: Any,
    ahead: Any,
    ahead_step: Any,
) -> None:
    """Write the loop for a fixed number of rows: see `_tile`."""
    before, loop = builder.basic_block, builder.append_basic_block(f"loop.{rows}")
    done = builder.append_basic_block(f"done.{rows}")
    starts = [w]
    for _ in range(_TOKENS - 1):
        starts.append(builder.add(starts[-1], w_stride))
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_INT)
    step.add_incoming(_INT(0), before)
    sums = [[builder.phi(_VECTOR) for _ in range(_TOKENS)] for _ in range(rows)]
    next_ahead = builder.add(ahead, builder.mul(step, ahead_step))
    for token in range(_TOKENS):
        _fetch(builder, next_ahead)
        if token < _TOKENS - 1:
            next_ahead = builder.add(next_ahead, w_stride)
    at = builder.mul(step, _INT(4 * WIDTH))
    partial = builder.icmp_signed("==", step, whole)
    entries: list[Any] = []
    for token, start in enumerate(starts):
        padded = builder.add(rest, _INT(4 * WIDTH * token))
        entries.append(_load(builder, builder.select(partial, padded, builder.add(start, at))))
    x_at = builder.add(x, builder.mul(at, _INT(rows)))
    added: list[list[Any]] = []
    for row in range(rows):
        mine = _load(builder, builder.add(x_at, _INT(4 * WIDTH * row)))
        added.append(
            [_add_product(builder, mine, entries[t], sums[row][t]) for t in range(_TOKENS)]
        )
    following = builder.add(step, _INT(1))
    step.add_incoming(following, loop)
    zeros = ir.Constant(_VECTOR, [0.0] * WIDTH)
    for before_it, after_it in zip(sums, added, strict=True):
        for old, new in zip(before_it, after_it, strict=True):
            old.add_incoming(zeros, before)
            old.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)
    builder.position_at_end(done)
    for new in added:
        _store(builder, _total(builder, new), out)
        out = builder.add(out, out_stride)


def _load(builder: Any, address: Any) -> Any:
    found = builder.load(builder.inttoptr(address, _VECTOR.as_pointer()))
    found.align = 4
    return found


def _store(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer())).align = 4


def _fetch(builder: Any, address: Any) -> None:
    """Bring a line to the nearest cache; an address that does not exist does no harm."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _SHORT, _SHORT, _SHORT])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    read, nearest, data = _SHORT(0), _SHORT(3), _SHORT(1)
    builder.call(fetch, [builder.inttoptr(address, pointer), read, nearest, data])


def _add_product(builder: Any, left: Any, right: Any, to: Any) -> Any:
    name, kind = f"llvm.fmuladd.v{WIDTH}f32", ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    known = builder.module.globals.get(name)
    function = known if known is not None else ir.Function(builder.module, kind, name)
    return builder.call(function, [left, right, to])


def _total(builder: Any, vectors: list[Any]) -> Any:
    """Return the sums over each of `_TOKENS` vectors, as one vector.

    Two steps bring the four together in every quarter of a register, the others add quarters.
    """
    first, second, third, fourth = vectors
    quarters, pair, sides = range(0, WIDTH, 4), (0, 1), (0, WIDTH)
    mixed = [quarter + one + side for quarter in quarters for one in pair for side in sides]
    left = _add_parts(builder, first, second, mixed, 2)
    right = _add_parts(builder, third, fourth, mixed, 2)
    in_order = [quarter + side + one for quarter in quarters for side in sides for one in pair]
    total, width = _add_parts(builder, left, right, in_order, 2), WIDTH // 2
    while width >= _TOKENS:
        total = _add_parts(builder, total, total, list(range(width)), width)
        width //= 2
    return total


def _add_parts(builder: Any, left: Any, right: Any, places: list[int], apart: int) -> Any:
    """Add entries of two vectors, counted through both, to those that stand `apart` from them."""
    integers = ir.VectorType(_SHORT, len(places))
    parts = [
        builder.shuffle_vector(left, right, ir.Constant(integers, [place + by for place in places]))
        for by in (0, apart)
    ]
    return builder.fadd(*parts)


@intrinsic
def _entry(_typing: Any, address: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Return the float at an address."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.load(builder.inttoptr(given[0], ir.FloatType().as_pointer()))

    return types.float32(types.int64), generate


@intrinsic
def _put(_typing: Any, address: Any, value: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Write a float to an address."""

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        builder.store(given[1], builder.inttoptr(given[0], ir.FloatType().as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


tile, put = cast("Callable[..., None]", _tile), cast("Callable[[int, float], None]", _put)
entry = cast("Callable[[int], float]", _entry)


@compiled("int64(int64, int64)", fastmath=set(), inline=True)
def _block_start(block: int, n_rows: int) -> int:
    """Return where a block of rows begins: they are as equal as can be, and at most `_ROWS`."""
    n_blocks = (n_rows + _ROWS - 1) // _ROWS
    return block * n_rows // n_blocks


@compiled("float32[::1](float32[:,:], int64)", fastmath=set())
def _packed(x: Floats, steps: int) -> Floats:
    """Return [step, row, WIDTH] of every block of rows, padded with zeros, from a whole line on."""
    n_rows, d = x.shape
    n_blocks = (n_rows + _ROWS - 1) // _ROWS
    memory = np.zeros(n_rows * steps * WIDTH + _LINE // 4, np.float32)
    packed = memory[(-memory.ctypes.data % _LINE) // 4 :]
    for block in range(n_blocks):
        start, stop = _block_start(block, n_rows), _block_start(block + 1, n_rows)
        at = start * steps * WIDTH
        for step in range(steps):
            for row in range(start, stop):
                for k in range(step * WIDTH, min(d, (step + 1) * WIDTH)):
                    packed[at + k - step * WIDTH] = x[row, k]
                at += WIDTH
    return packed


@compiled("void(int64[::1])", fastmath=set())
def multiply_tokens(task: Longs) -> None:
    """Take some rows of the matrix at a time until none is left."""
    n_rows, n_tokens, d = task[N_ROWS], task[N_TOKENS], task[N_ENTRIES]
    whole, steps = d // WIDTH, (d + WIDTH - 1) // WIDTH
    n_blocks = (n_rows + _ROWS - 1) // _ROWS
    rest = np.zeros((_TOKENS, WIDTH), np.float32)
    single = np.empty((_ROWS, _TOKENS), np.float32)
    counter = task.ctypes.data + 8 * NEXT
    while True:
        token = take(counter) * _AT_ONCE
        if token >= n_tokens:
            break
        last = min(n_tokens, token + _AT_ONCE)
        while token < last:
            # The last tokens, if they do not fill a tile, come one by one.
            alone = token + _TOKENS > last
            stride = 0 if alone else task[W_ROW]
            at = task[W] + token * task[W_ROW]
            for column in range(_TOKENS if whole < steps else 0):
                for k in range(whole * WIDTH, d):
                    rest[column, k - whole * WIDTH] = entry(at + column * stride + 4 * k)
            for block in range(n_blocks):
                start, stop = _block_start(block, n_rows), _block_start(block + 1, n_rows)
                out = task[OUT] + start * task[OUT_ROW] + 4 * token
                tile(
                    stop - start,
                    task[X] + 4 * start * steps * WIDTH,
                    at,
                    stride,
                    rest.ctypes.data,
                    whole,
                    steps,
                    single.ctypes.data if alone else out,
                    single.strides[0] if alone else task[OUT_ROW],
                    # Every block fetches its share of the next tile.
                    at + _TOKENS * task[W_ROW] + block * (4 * d // n_blocks),
                    4 * WIDTH // n_blocks,
                )
                if alone:
                    for row in range(stop - start):
                        put(out + row * task[OUT_ROW], single[row, 0])
            token += 1 if alone else _TOKENS


@callback("void(CPointer(int64))")
def multiply_tokens_at(address: Longs) -> None:
    """Do what `multiply_tokens` does, for the task at an address."""
    multiply_tokens(as_array(address, (FIELDS,)))


def multiply(x: Floats, w: Floats, out: Floats, *, threads: int = 1) -> None:
    """Write ``x @ w.T``.

    Args:
        x: [row, d]
        w: [token, d]; the entries of a row lie side by side.
        out: [row, token]; the entries of a row lie side by side.
        threads: how many of torch's threads take part, where they can be asked.
    """
    packed = _packed(x, -(-x.shape[1] // WIDTH))
    task = np.zeros(FIELDS, np.int64)
    task[[X, W, W_ROW, OUT, OUT_ROW]] = (
        packed.ctypes.data,
        w.ctypes.data,
        w.strides[0],
        out.ctypes.data,
        out.strides[0],
    )
    task[[N_ROWS, N_TOKENS, N_ENTRIES]] = len(x), len(w), x.shape[1]
    if threads > 1 and openmp.available():
        openmp.run(multiply_tokens_at, task.ctypes.data, threads=threads)
    else:
        multiply_tokens(task)
