"""Causal attention of many short rows, each with its own past, in one compiled call.

A row has few tokens, and what torch does for it takes longer to ask for than to do: slices, copies
of keys, masks, a kernel. Here threads take rows by turns; keys that many rows continue
are read where they lie. Everything is float32, within a few roundings of the same formula in
float64. Importing this module compiles its loops, or loads them from numba's cache.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic
from torch import Tensor

from layerscope.products import hardware, openmp
from layerscope.products.compiling import Longs, as_array, callback, compiled, longs_at, take
from layerscope.products.elementwise import pointer
from layerscope.products.instructions import (
    FLOATS,
    LINE,
    LONG,
    SIDE,
    WORDS,
    Writes,
    call,
    everywhere,
    fetch,
    fma,
    ir,
    larger,
    load,
    mask_of,
    number_at,
    plus,
    put,
    repeat,
    same,
    store,
    turned,
    vector,
    written,
)

_QUERIES, _WIDE = 8, 2  # queries, and vectors of 16 numbers, that are added up together
_PAIR = _WIDE * SIDE
_LOG2_E = 1.4426950408889634

# Fields of a task: addresses, distances in bytes, counts.
(
    QUERY, Q_HEAD, Q_TOKEN, KEY, K_HEAD, K_TOKEN, VALUE, V_HEAD, V_TOKEN,
    PAST_KEY, PK_ROW, PK_HEAD, PK_TOKEN, PAST_VALUE, PV_ROW, PV_HEAD, PV_TOKEN,
    OUT, ROWS, N_ROWS, KV_HEADS, SHARING, D, D_VALUE, ENDS, SCALE, LONGEST, NEXT, FIELDS,
) = range(29)  # fmt: skip


@intrinsic
def _outer(  # pyright: ignore[reportUnusedFunction]
    _typing: Any,
    a: Any,
    a_stride: Any,
    b: Any,
    b_stride: Any,
    depth: Any,
    out: Any,
    out_stride: Any,
) -> Any:
    """Write ``A @ B`` for 8 rows of A and 32 columns of B.

    Args:
        a: address of the rows, whose entries lie side by side.
        a_stride: from one row to the next.
        b: address of the entries of the first of `depth` lines.
        b_stride: from one line to the next.
        depth: how many products are added up, at least one.
        out: address of the first row of results.
        out_stride: from one row of them to the next.
    """

    def write(builder: Any, *given: Any) -> None:
        a, a_stride, b, b_stride, depth, out, out_stride = given
        sums = [[alloca_once(builder, FLOATS) for _ in range(_WIDE)] for _ in range(_QUERIES)]
        for row in sums:
            for place in row:
                builder.store(same(FLOATS, 0.0), place)
        starts = [builder.add(a, builder.mul(a_stride, LONG(row))) for row in range(_QUERIES)]

        def step(index: Any) -> None:
            line = builder.add(b, builder.mul(index, b_stride))
            lines = [vector(builder, plus(builder, line, part * LINE)) for part in range(_WIDE)]
            for start, row in zip(starts, sums, strict=True):
                address = builder.add(start, builder.mul(index, LONG(4)))
                number = everywhere(builder, number_at(builder, address))
                for place, found in zip(row, lines, strict=True):
                    builder.store(fma(builder, number, found, builder.load(place)), place)

        repeat(builder, depth, step)
        for number, row in enumerate(sums):
            start = builder.add(out, builder.mul(out_stride, LONG(number)))
            for part, place in enumerate(row):
                put(builder, builder.load(place), plus(builder, start, part * LINE))

    return written(write, 7)


@intrinsic
def _turn(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, lines: Any, stride: Any, n_lines: Any, width: Any, out: Any, out_stride: Any
) -> Any:
    """Write 16 lines of 16 floats as columns.

    Args:
        lines: address of the first line.
        stride: from one line to the next.
        n_lines: how many there are; the others are zeros.
        width: how many floats each has; the others are zeros.
        out: address of the first column's first entry, at any place.
        out_stride: from one entry of a column to the next.
    """

    def write(builder: Any, *given: Any) -> None:
        lines, stride, n_lines, width, out, out_stride = given
        found: list[Any] = []
        for index in range(SIDE):
            there = builder.icmp_signed("<", LONG(index), n_lines)
            mask = mask_of(builder, builder.select(there, width, LONG(0)))
            address = builder.add(lines, builder.mul(stride, LONG(index)))
            found.append(load(builder, address, mask))
        for index, line in enumerate(turned(builder, found)):
            address = builder.add(out, builder.mul(out_stride, LONG(index)))
            builder.store(line, builder.inttoptr(address, FLOATS.as_pointer())).align = 4

    return written(write, 6)


@intrinsic
def _scaled(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, source: Any, width: Any, scale: Any, out: Any, out_width: Any
) -> Any:
    """Write a line multiplied by a number.

    Args:
        source: address of the line.
        width: how many floats it has.
        scale: address of the number.
        out: address of the result.
        out_width: how many floats of it are written, at least one; what exceeds `width` is zero.
    """

    def write(builder: Any, *given: Any) -> None:
        source, width, scale, out, out_width = given
        number = everywhere(builder, number_at(builder, scale))

        def part(index: Any) -> None:
            done, distance = (builder.mul(index, LONG(size)) for size in (SIDE, LINE))
            mask = mask_of(builder, builder.sub(width, done))
            found = builder.fmul(load(builder, builder.add(source, distance), mask), number)
            mask = mask_of(builder, builder.sub(out_width, done))
            store(builder, found, builder.add(out, distance), mask)

        parts = builder.sdiv(plus(builder, out_width, SIDE - 1), LONG(SIDE))
        repeat(builder, parts, part)

    return written(write, 5)


def _exp2(builder: Any, x: Any) -> Any:
    """Return what `powers.exp2` does, of 16 numbers."""
    # Coefficients of `powers`, the highest first.
    polynomial = (1.53458104e-4, 1.33999312e-3, 9.61848896e-3, 5.55032878e-2, 2.40226469e-1)
    rounder, bits = 1.5 * 2.0**23, 0x4B400000
    rounded = builder.bitcast(builder.fadd(x, same(FLOATS, rounder)), WORDS)
    whole = builder.sub(rounded, same(WORDS, bits))
    f = builder.fsub(x, builder.sitofp(whole, FLOATS))
    power = same(FLOATS, polynomial[0])
    for number in (*polynomial[1:], 6.93147206e-1, 1.0):
        power = fma(builder, power, f, same(FLOATS, number))
    scale = builder.shl(builder.add(whole, same(WORDS, 127)), same(WORDS, 23))
    found = builder.fmul(power, builder.bitcast(scale, FLOATS))
    tiny = builder.fcmp_ordered("<", x, same(FLOATS, -126.0))
    return builder.select(tiny, same(FLOATS, 0.0), found)


@intrinsic
def _softmax(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, scores: Any, n_visible: Any, n: Any, inverse: Any
) -> Any:
    """Replace scores by powers of two over the largest, and write the inverse of their sum.

    Args:
        scores: address of a line.
        n_visible: how many count, at least one; the others become zeros.
        n: how many there are; up to 15 more may be written.
        inverse: address of the result.
    """

    def write(builder: Any, *given: Any) -> None:
        scores, n_visible, n, inverse = given
        lowest = same(FLOATS, -math.inf)
        largest, total = alloca_once(builder, FLOATS), alloca_once(builder, FLOATS)
        builder.store(lowest, largest)
        builder.store(same(FLOATS, 0.0), total)

        def at(index: Any) -> tuple[Any, Any, Any]:
            address = builder.add(scores, builder.mul(index, LONG(LINE)))
            seen = mask_of(builder, builder.sub(n_visible, builder.mul(index, LONG(SIDE))))
            return address, seen, builder.select(seen, vector(builder, address), lowest)

        def compare(index: Any) -> None:
            found = at(index)[2]
            builder.store(larger(builder, found, builder.load(largest)), largest)

        def raise_to(index: Any) -> None:
            address, seen, found = at(index)
            power = _exp2(builder, builder.fsub(found, builder.load(largest)))
            power = builder.select(seen, power, same(FLOATS, 0.0))
            put(builder, power, address)
            builder.store(builder.fadd(builder.load(total), power), total)

        parts = builder.sdiv(plus(builder, n, SIDE - 1), LONG(SIDE))
        repeat(builder, parts, compare)
        found = builder.load(largest)
        one = call(builder, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), found)
        builder.store(everywhere(builder, one), largest)
        repeat(builder, parts, raise_to)
        zero = ir.Constant(ir.FloatType(), 0.0)
        name = "llvm.vector.reduce.fadd.v16f32"
        whole = call(builder, name, ir.FloatType(), zero, builder.load(total))
        found = builder.fdiv(ir.Constant(ir.FloatType(), 1.0), whole)
        builder.store(found, builder.inttoptr(inverse, ir.FloatType().as_pointer())).align = 4

    return written(write, 4)


@intrinsic
def _expect(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, lines: Any, stride: Any, n_lines: Any, width: Any
) -> Any:
    """Bring lines of floats to the nearest cache.

    Args:
        lines: address of the first line.
        stride: from one line to the next.
        n_lines: how many, at least one.
        width: how many floats each has, at least one.
    """

    def write(builder: Any, *given: Any) -> None:
        lines, stride, n_lines, width = given
        parts = builder.sdiv(plus(builder, width, SIDE - 1), LONG(SIDE))

        def line(index: Any) -> None:
            start = builder.add(lines, builder.mul(index, stride))

            def part(index: Any) -> None:
                fetch(builder, builder.add(start, builder.mul(index, LONG(LINE))))

            repeat(builder, parts, part)

        repeat(builder, n_lines, line)

    return written(write, 4)


expect = cast("Writes", _expect)
outer, turn = cast("Writes", _outer), cast("Writes", _turn)
scaled, softmax = cast("Writes", _scaled), cast("Writes", _softmax)


@compiled("int64(int64, int64)", fastmath=set(), inline=True)
def _up(n: int, size: int) -> int:
    return (n + size - 1) // size * size


@compiled("void(int64, int64, int64, int64, int64, int64, int64)", fastmath=set(), inline=True)
def _turn_keys(
    source: int, stride: int, n: int, d: int, out: int, out_stride: int, first: int
) -> None:
    """Write n keys as columns of a matrix with `d` lines, from column `first` on."""
    for key in range(0, n, SIDE):
        for entry in range(0, d, SIDE):
            start = source + key * stride + 4 * entry
            to = out + 4 * (first + key) + entry * out_stride
            turn(start, stride, n - key, min(d - entry, SIDE), to, out_stride)


@compiled("void(int64[::1], int64, int64, int64)", fastmath=set(), inline=True)
def _head(task: Longs, number: int, head: int, memory: int) -> None:
    """Compute what all queries of one row get that ask one head of keys."""
    d, d_value, sharing, n_heads = task[D], task[D_VALUE], task[SHARING], task[KV_HEADS]
    given = as_array(longs_at(task[ROWS] + 32 * number), (4,))
    begin, column, width, row = given[0], given[1], given[2], given[3]
    n_keys = column + width
    # Memory, of which every line is a whole number of vectors.
    line, value_line = 4 * (_up(task[LONGEST], _PAIR) + _PAIR), 4 * _up(d_value, _PAIR)
    query_line = 4 * _up(d, SIDE)
    one, inverse = memory, memory + LINE
    queries = memory + 2 * LINE
    keys = queries + _QUERIES * query_line
    values = keys + _up(d, SIDE) * line
    scores = values + task[LONGEST] * value_line
    mixed = scores + _QUERIES * line

    past, own = task[PAST_KEY] + row * task[PK_ROW] + head * task[PK_HEAD], task[KEY]
    own += head * task[K_HEAD] + begin * task[K_TOKEN]
    _turn_keys(past, task[PK_TOKEN], column, d, keys, line, 0)
    _turn_keys(own, task[K_TOKEN], width, d, keys, line, column)
    past, own = task[PAST_VALUE] + row * task[PV_ROW] + head * task[PV_HEAD], task[VALUE]
    own += head * task[V_HEAD] + begin * task[V_TOKEN]
    for key in range(n_keys):
        start = past + key * task[PV_TOKEN]
        if key >= column:
            start = own + (key - column) * task[V_TOKEN]
        scaled(start, d_value, one, values + key * value_line, value_line // 4)

    if head + 1 < n_heads:
        for which in range(sharing):
            start = task[QUERY] + ((head + 1) * sharing + which) * task[Q_HEAD]
            expect(start + begin * task[Q_TOKEN], task[Q_TOKEN], width, d)
        start = task[KEY] + (head + 1) * task[K_HEAD] + begin * task[K_TOKEN]
        expect(start, task[K_TOKEN], width, d)
        expect(own + task[V_HEAD], task[V_TOKEN], width, d_value)

    first = (width - 1) * sharing if task[ENDS] else 0
    for query in range(first, width * sharing, _QUERIES):
        n = min(_QUERIES, width * sharing - query)
        for i in range(_QUERIES):
            # What is missing of eight is the last one again, which nobody reads.
            asks = query + min(i, n - 1)
            start = task[QUERY] + (head * sharing + asks % sharing) * task[Q_HEAD]
            start += (begin + asks // sharing) * task[Q_TOKEN]
            scaled(start, d, task[SCALE], queries + i * query_line, d)
        deepest = column + (query + n - 1) // sharing + 1
        for key in range(0, deepest, _PAIR):
            outer(queries, query_line, keys + 4 * key, line, d, scores + 4 * key, line)
        for i in range(_QUERIES):
            visible = column + (query + min(i, n - 1)) // sharing + 1
            softmax(scores + i * line, visible, deepest, inverse + 4 * i)
        for entry in range(0, d_value, _PAIR):
            outer(
                scores, line, values + 4 * entry, value_line, deepest, mixed + 4 * entry, value_line
            )
        for i in range(n):
            asks = query + i
            place = (begin + asks // sharing) * n_heads * sharing + head * sharing + asks % sharing
            out = task[OUT] + 4 * place * d_value
            scaled(mixed + i * value_line, d_value, inverse + 4 * i, out, d_value)


@compiled("void(int64[::1])", fastmath=set())
def attend(task: Longs) -> None:
    """Take rows by turns until none is left."""
    line, value_line = 4 * (_up(task[LONGEST], _PAIR) + _PAIR), 4 * _up(task[D_VALUE], _PAIR)
    memory = np.empty(
        4 * LINE
        + _QUERIES * (4 * _up(task[D], SIDE) + line + value_line)
        + _up(task[D], SIDE) * line
        + task[LONGEST] * value_line,
        np.uint8,
    )
    start = memory.ctypes.data + -memory.ctypes.data % LINE
    as_array(pointer(start), (1,))[0] = 1.0
    counter = task.ctypes.data + 8 * NEXT
    while True:
        number = take(counter)
        if number >= task[N_ROWS]:
            break
        for head in range(task[KV_HEADS]):
            _head(task, number, head, start)
    memory[0] = 0  # until here numba must not free what is used by its address


@callback("void(CPointer(int64))")
def attend_at(address: Longs) -> None:
    """Do what `attend` does, for the task at an address."""
    attend(as_array(address, (FIELDS,)))


def suits(*tensors: Tensor) -> bool:
    """Return True where tensors lie as these loops want them, and the CPU has wide vectors."""
    return (
        openmp.available()
        and hardware.has_wide_vectors()
        and all(
            tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.stride(-1) == 1
            for tensor in tensors
        )
    )


def causal_attention(
    query: Float[Tensor, "head token d"],
    key: Float[Tensor, "kv_head token d"],
    value: Float[Tensor, "kv_head token d_value"],
    past: tuple[Float[Tensor, "row kv_head key d"], Float[Tensor, "row kv_head key d_value"]],
    rows: Int[Tensor, "n 4"],
    *,
    scale: float,
    ends: bool = False,
) -> Float[Tensor, "token head d_value"]:
    """Return what queries mix of the values that they may see.

    Args:
        query: of all tokens, one row after the other; heads that share keys are neighbours.
        key: of the same tokens.
        value: of the same tokens.
        past: keys and values of the rows that are continued.
        rows: of each its first token, how many keys of the past it continues, how many tokens it
            has, and which row of the past it continues.
        scale: what products of queries and keys are multiplied by.
        ends: only the last token of every row asks; the others get zero.
    """
    n_heads, n_tokens, d = query.shape
    kv_heads, _, d_value = value.shape
    # Loops read what they are told to: nothing may lie outside.
    _, column, _, row = rows.amax(0).tolist()
    ends_of_rows, longest = (rows[:, :2] + rows[:, 2:3]).amax(0).tolist()
    assert int(rows.amin()) >= 0 and ends_of_rows <= n_tokens
    stored = [each.shape for each in past]
    assert all(row < shape[0] and column <= shape[2] for shape in stored)
    assert [shape[1::2] for shape in stored] == [(kv_heads, d), (kv_heads, d_value)]
    assert int(rows[:, 2].sum()) == n_tokens == key.shape[1] == value.shape[1]
    out = query.new_empty(n_tokens, n_heads, d_value)
    if ends:
        out.zero_()
    rows, factor = rows.contiguous(), np.array([scale * _LOG2_E], np.float32)
    task = np.zeros(FIELDS, np.int64)
    places = (QUERY, query), (KEY, key), (VALUE, value), (PAST_KEY, past[0]), (PAST_VALUE, past[1])
    for field, tensor in places:
        task[field] = tensor.data_ptr()
        strides = [4 * stride for stride in tensor.stride()[:-1]]
        task[field + 1 : field + 1 + len(strides)] = strides
    task[[OUT, SCALE]] = out.data_ptr(), factor.ctypes.data
    task[[ROWS, N_ROWS]] = rows.data_ptr(), len(rows)
    task[[KV_HEADS, SHARING, D, D_VALUE]] = kv_heads, n_heads // kv_heads, d, d_value
    task[[ENDS, LONGEST]] = ends, longest
    threads = torch.get_num_threads()
    if threads == 1:
        attend(task)
    else:
        openmp.run(attend_at, task.ctypes.data, threads=threads)
    return out
