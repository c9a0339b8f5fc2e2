"""Float32 products on the matrix units of x86 CPUs (AMX), as compiled loops.

The intrinsics here write the machine's instructions into numba's loops. A block has 16 rows and 16
columns and adds up ``A @ B`` over 32 entries at a time. Both factors are held as three parts of 8
significant bits each (bfloat16) whose sum is the float32 number: each part cuts off the upper half
of the bits of what the parts before have left. One part over 32 entries fills one register, 16
lines of 64 bytes: in A a line has the 32 entries of one row; in B it has the entries 2 k and
2 k + 1 of the 16 columns, side by side. The three parts follow each other.

All arguments are integers: addresses, counts, and distances in bytes. Everything is in one file
because numba's cache on the disk knows a loop by the age of the file that it is in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from layerscope.products.compiling import Longs, as_array, callback, compiled, take

ir: Any = importlib.import_module("llvmlite.ir")

SIDE, DEPTH = 16, 32  # rows or columns of a block; entries that are added up at a time
PARTS = 3
LINE = 64
PART_BYTES = SIDE * LINE
STEP_BYTES = PARTS * PART_BYTES  # of one factor, over DEPTH entries

_LONG, _INT, _SHORT, _BYTE, _BIT = (ir.IntType(bits) for bits in (64, 32, 16, 8, 1))
_POINTER, _VOID = ir.PointerType(), ir.VoidType()
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), SIDE), ir.VectorType(_INT, SIDE)
_HALVES = ir.VectorType(_SHORT, 2 * SIDE)
_ZEROS = ir.Constant(_FLOATS, [0.0] * SIDE)

CHUNK = 768  # entries added up at a time: with PANEL rows, their parts fit in the second cache
PANEL = 256  # rows (or columns), at most, that one thread takes at a time
AT_ONCE = 2 * SIDE  # rows, and columns, that `blocks` takes
AHEAD = 12  # lines of the next columns (or rows) fetched in a step: all of them in a PANEL

# Fields of a task.
(
    A, A_ROW, A_ENTRY, B, B_COLUMN, B_ENTRY, OUT, OUT_ROW, OUT_COLUMN, BIAS,
    N_ROWS, N_COLUMNS, N_ENTRIES, PACKED, COLUMNS_PACKED, N_PANELS, NEXT, FIELDS,
) = range(18)  # fmt: skip

# Which part of A meets which of B, 0 the largest. What is left out is below 2 ** -20 of a product.
# From one pair to the next one factor stays, so that few registers are read again.
_PAIRS = ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))


def _written(write: Callable[..., Any], n_arguments: int, returns: Any = types.void) -> Any:
    """Return what numba wants of an intrinsic: its signature, and the function that writes it."""

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        found = write(builder, *given)
        return context.get_dummy_value() if returns is types.void else found

    return returns(*[types.int64] * n_arguments), generate


def _call(builder: Any, name: str, returns: Any, *given: Any) -> Any:
    kind = ir.FunctionType(returns, [each.type for each in given])
    known = builder.module.globals.get(name)
    function = known if known is not None else ir.Function(builder.module, kind, name)
    return builder.call(function, given)


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _POINTER)


def _plus(builder: Any, address: Any, distance: int) -> Any:
    return builder.add(address, _LONG(distance))


def _fetch(builder: Any, address: Any, *, nearest: bool = True) -> None:
    """Bring a line to the nearest or the second cache; an address of nothing does no harm."""
    read, cache, data = _INT(0), _INT(3 if nearest else 2), _INT(1)
    _call(builder, "llvm.prefetch.p0", _VOID, _at(builder, address), read, cache, data)


def _share(n: int, turn: int, n_turns: int) -> range:
    """Return which of n things are done in a turn, where turns share them evenly."""
    return range(turn * n // n_turns, (turn + 1) * n // n_turns)


def _repeat(builder: Any, times: Any, write: Callable[[Any], None]) -> None:
    """Write a loop over 0, 1, ... `times` - 1, at least once."""
    before, body = builder.basic_block, builder.append_basic_block("repeat")
    after = builder.append_basic_block("after")
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(_LONG)
    index.add_incoming(_LONG(0), before)
    write(index)
    following = builder.add(index, _LONG(1))
    index.add_incoming(following, builder.basic_block)
    builder.cbranch(builder.icmp_signed("<", following, times), body, after)
    builder.position_at_end(after)


def _first(builder: Any, count: Any) -> Any:
    """Return a mask of the first `count` of SIDE entries."""
    one = builder.insert_element(
        ir.Constant(_WORDS, ir.Undefined), builder.trunc(count, _INT), _INT(0)
    )
    everywhere = builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * SIDE))
    return builder.icmp_signed("<", ir.Constant(_WORDS, list(range(SIDE))), everywhere)


def _load(builder: Any, address: Any, mask: Any) -> Any:
    name, where = "llvm.masked.load.v16f32.p0", _at(builder, address)
    return _call(builder, name, _FLOATS, where, _INT(4), mask, _ZEROS)


def _store(builder: Any, vector: Any, address: Any, mask: Any) -> None:
    name, where = "llvm.masked.store.v16f32.p0", _at(builder, address)
    _call(builder, name, _VOID, vector, where, _INT(4), mask)


@intrinsic
def _configure(_typing: Any, layout: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Give this thread eight registers of 16 lines of 64 bytes, as written at `layout`."""

    def write(builder: Any, at: Any) -> None:
        _call(builder, "llvm.x86.ldtilecfg", _VOID, _at(builder, at))

    return _written(write, 1)


@intrinsic
def _release(_typing: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Give the registers back."""

    def write(builder: Any) -> None:
        _call(builder, "llvm.x86.tilerelease", _VOID)

    return _written(write, 0)


@intrinsic
def _split(  # pyright: ignore[reportUnusedFunction]
    _typing: Any,
    first: Any,
    second: Any,
    stride: Any,
    n_first: Any,
    n_second: Any,
    width_first: Any,
    width_second: Any,
    side_by_side: Any,
    out: Any,
) -> Any:
    """Write the three parts of 16 lines of two vectors of 16 floats each.

    Args:
        first: address of the first vector of the first line.
        second: address of the second.
        stride: from one line to the next.
        n_first: how many lines of first vectors there are; the others are zeros.
        n_second: how many of second vectors.
        width_first: how many entries of the first vectors there are; the others are zeros.
        width_second: how many of the second.
        side_by_side: 1 puts the entries of both vectors alternately, 0 one vector after the other.
        out: address of the parts.
    """

    def write(
        builder: Any,
        first: Any,
        second: Any,
        stride: Any,
        n_first: Any,
        n_second: Any,
        width_first: Any,
        width_second: Any,
        side_by_side: Any,
        out: Any,
    ) -> None:
        def line(index: Any, *, order: list[int], whole: bool) -> None:
            rests: list[Any] = []
            for start, count, width in (
                (first, n_first, width_first),
                (second, n_second, width_second),
            ):
                address = builder.add(start, builder.mul(index, stride))
                if whole:
                    found = builder.load(builder.inttoptr(address, _FLOATS.as_pointer()))
                    found.align = 4
                else:
                    there = builder.icmp_signed("<", index, count)
                    count = builder.select(there, width, _LONG(0))
                    found = _load(builder, address, _first(builder, count))
                rests.append(found)
            upper = ir.Constant(_WORDS, [0xFFFF0000] * SIDE)
            at = builder.add(out, builder.mul(index, _LONG(LINE)))
            for part in range(PARTS):
                halves = [builder.bitcast(rest, _HALVES) for rest in rests]
                chosen = ir.Constant(ir.VectorType(_INT, 2 * SIDE), order)
                packed = builder.shuffle_vector(*halves, chosen)
                where = _plus(builder, at, part * PART_BYTES)
                builder.store(packed, builder.inttoptr(where, _HALVES.as_pointer())).align = LINE
                if part < PARTS - 1:
                    cut = [builder.and_(builder.bitcast(rest, _WORDS), upper) for rest in rests]
                    rests = [
                        builder.fsub(rest, builder.bitcast(large, _FLOATS))
                        for rest, large in zip(rests, cut, strict=True)
                    ]

        uppers = [2 * index + 1 for index in range(2 * SIDE)]
        orders = {0: uppers, 1: [uppers[i // 2 + SIDE * (i % 2)] for i in range(2 * SIDE)]}
        counts = builder.add(n_first, n_second), builder.add(width_first, width_second)
        whole = builder.and_(
            *[builder.icmp_signed("==", count, _LONG(2 * SIDE)) for count in counts]
        )
        done = builder.append_basic_block("split")
        for alternately, order in orders.items():
            for complete in (1, 0):
                mine, other = (builder.append_basic_block("case") for _ in range(2))
                asked = builder.icmp_signed("==", side_by_side, _LONG(alternately))
                fits = builder.icmp_signed("==", whole, _BIT(complete))
                builder.cbranch(builder.and_(asked, fits), mine, other)
                builder.position_at_end(mine)
                _repeat(builder, _LONG(SIDE), partial(line, order=order, whole=bool(complete)))
                builder.branch(done)
                builder.position_at_end(other)
        builder.branch(done)
        builder.position_at_end(done)

    return _written(write, 9)


@intrinsic
def _transpose(_typing: Any, source: Any, out: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Exchange lines and columns of 16 lines of 16 numbers of 4 bytes; `out` may be `source`."""

    def write(builder: Any, source: Any, out: Any) -> None:
        pointer = _WORDS.as_pointer()
        lines: list[Any] = []
        for index in range(SIDE):
            where = _plus(builder, source, LINE * index)
            found = builder.load(builder.inttoptr(where, pointer))
            found.align = LINE
            lines.append(found)
        # Squares of 8, 4, 2 and 1: those off the diagonal change places.
        size = SIDE // 2
        while size:
            low = [i if i & size == 0 else i - size + SIDE for i in range(SIDE)]
            high = [i + size if i & size == 0 else i + SIDE for i in range(SIDE)]
            for index in range(SIDE):
                if index & size == 0:
                    pair = lines[index], lines[index + size]
                    for place, order in ((index, low), (index + size, high)):
                        chosen = ir.Constant(_WORDS, order)
                        lines[place] = builder.shuffle_vector(*pair, chosen)
            size //= 2
        for index, found in enumerate(lines):
            where = _plus(builder, out, LINE * index)
            builder.store(found, builder.inttoptr(where, pointer)).align = LINE

    return _written(write, 2)


@intrinsic
def _blocks(  # pyright: ignore[reportUnusedFunction]
    _typing: Any,
    a: Any,
    next_a: Any,
    b: Any,
    next_b: Any,
    steps: Any,
    start: Any,
    start_stride: Any,
    start_right: Any,
    start_below: Any,
    out: Any,
    out_stride: Any,
    out_right: Any,
    out_below: Any,
    ahead: Any,
) -> Any:
    """Add up two rows x two columns of blocks over `steps` times DEPTH entries.

    Args:
        a: address of the parts of 16 rows, step after step.
        next_a: of the 16 rows of the second row of blocks.
        b: of 16 columns.
        next_b: of the 16 columns of the second column of blocks.
        steps: how many.
        start: address of the floats that sums start from.
        start_stride: from one line of a block of these to the next.
        start_right: from a block to its neighbour on the right.
        start_below: from a block to the one below.
        out: address of the results, which may be `start`.
        out_stride: as `start_stride`, for results.
        out_right: as `start_right`.
        out_below: as `start_below`.
        ahead: address of what is wanted next, AHEAD lines of which are fetched in each step.
    """

    def write(builder: Any, *given: Any) -> None:
        a, next_a, b, next_b, steps, *where_from, ahead = given
        start, start_stride, start_right, start_below = where_from[:4]
        out, out_stride, out_right, out_below = where_from[4:]
        sums, rows, columns = (0, 1, 2, 3), (4, 5), (6, 7)

        def read(registers: tuple[int, int], starts: tuple[Any, Any], part: int) -> None:
            for register, begin in zip(registers, starts, strict=True):
                where = _at(builder, _plus(builder, begin, part * PART_BYTES))
                _call(builder, "llvm.x86.tileloadd64", _VOID, _BYTE(register), where, _LONG(LINE))

        def step(index: Any) -> None:
            distance = builder.mul(index, _LONG(STEP_BYTES))
            left = tuple(builder.add(begin, distance) for begin in (a, next_a))
            right = tuple(builder.add(begin, distance) for begin in (b, next_b))
            held: tuple[int, int] | tuple[None, None] = None, None
            soon = [
                _plus(builder, begin, STEP_BYTES + line * LINE)
                for line in range(STEP_BYTES // LINE)
                for begin in (*left, *right)
            ]
            later = builder.add(ahead, builder.mul(index, _LONG(AHEAD * LINE)))
            turns = [(pair, target) for pair in _PAIRS for target in sums]
            for turn, (pair, target) in enumerate(turns):
                if pair[0] != held[0]:
                    read(rows, left, pair[0])
                if pair[1] != held[1]:
                    read(columns, right, pair[1])
                held = pair
                registers = target, rows[target // 2], columns[target % 2]
                numbers = [_BYTE(register) for register in registers]
                _call(builder, "llvm.x86.tdpbf16ps", _VOID, *numbers)
                for line in _share(len(soon), turn, len(turns)):
                    _fetch(builder, soon[line])
                for line in _share(AHEAD, turn, len(turns)):
                    _fetch(builder, _plus(builder, later, line * LINE), nearest=False)

        def place(begin: Any, right: Any, below: Any, register: int) -> Any:
            if register // 2:
                begin = builder.add(begin, below)
            return _at(builder, builder.add(begin, right) if register % 2 else begin)

        for register in sums:
            where = place(start, start_right, start_below, register)
            _call(builder, "llvm.x86.tileloadd64", _VOID, _BYTE(register), where, start_stride)
        _repeat(builder, steps, step)
        for register in sums:
            where = place(out, out_right, out_below, register)
            _call(builder, "llvm.x86.tilestored64", _VOID, _BYTE(register), where, out_stride)

    return _written(write, 14)


@intrinsic
def _move(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, source: Any, stride: Any, out: Any, out_stride: Any, n_lines: Any, width: Any
) -> Any:
    """Copy the first floats of lines.

    Args:
        source: address of the first line.
        stride: from one line to the next.
        out: address of the first line of the copy.
        out_stride: from one line of it to the next.
        n_lines: how many, at least one.
        width: how many floats of each, 16 at most.
    """

    def write(
        builder: Any,
        source: Any,
        stride: Any,
        out: Any,
        out_stride: Any,
        n_lines: Any,
        width: Any,
    ) -> None:
        mask = _first(builder, width)

        def line(index: Any) -> None:
            found = _load(builder, builder.add(source, builder.mul(index, stride)), mask)
            _store(builder, found, builder.add(out, builder.mul(index, out_stride)), mask)

        _repeat(builder, n_lines, line)

    return _written(write, 6)


Writes = Callable[..., None]
configure, release = cast("Writes", _configure), cast("Writes", _release)
split, transpose = cast("Writes", _split), cast("Writes", _transpose)
blocks, move = cast("Writes", _blocks), cast("Writes", _move)


@compiled("void(int64, int64, int64, int64, int64, int64, int64)", fastmath=set(), inline=True)
def _pack_one(
    source: int, across: int, along: int, n: int, n_entries: int, out: int, is_column: int
) -> None:
    """Write the parts of 16 rows (or columns) of a factor over DEPTH entries.

    Args:
        source: address of the first entry.
        across: distance from one row to the next.
        along: distance from one entry to the next; `along` or `across` is 4.
        n: how many rows there are; at least 1.
        n_entries: how many entries there are; at least 1.
        out: address of the parts.
        is_column: 1 for columns of B, 0 for rows of A.
    """
    n, n_entries = min(n, SIDE), min(n_entries, DEPTH)
    if along == 4:
        first, second = min(n_entries, SIDE), max(n_entries - SIDE, 0)
        split(source, source + 4 * SIDE, across, n, n, first, second, 0, out)
    else:
        first, second = (n_entries + 1) // 2, n_entries // 2
        split(source, source + along, 2 * along, first, second, n, n, 1, out)
    if (along == 4) == (is_column == 1):
        for part in range(PARTS):
            transpose(out + part * PART_BYTES, out + part * PART_BYTES)


@compiled("int64(int64)", fastmath=set(), inline=True)
def _steps(n_entries: int) -> int:
    return (n_entries + DEPTH - 1) // DEPTH


@compiled("int64(int64)", fastmath=set(), inline=True)
def _tiles(n: int) -> int:
    """Return how many blocks side by side have room for n rows or columns, in pairs."""
    return (n + AT_ONCE - 1) // AT_ONCE * 2


@compiled("void(int64[::1])", fastmath=set())
def pack(task: Longs) -> None:
    """Write the parts of B, or of A, chunk after chunk of its entries, 16 columns at a time."""
    n_entries, is_column = task[N_ENTRIES], task[COLUMNS_PACKED]
    if is_column == 1:
        source, across, along, n = task[B], task[B_COLUMN], task[B_ENTRY], task[N_COLUMNS]
    else:
        source, across, along, n = task[A], task[A_ROW], task[A_ENTRY], task[N_ROWS]
    n_tiles = _tiles(n)
    counter = task.ctypes.data + 8 * NEXT
    while True:
        tile = take(counter)
        if tile >= n_tiles:
            break
        left = n - tile * SIDE
        if left <= 0:
            continue  # the other half of the last pair, whose results nobody reads
        for chunk in range(0, n_entries, CHUNK):
            length = min(CHUNK, n_entries - chunk)
            out = task[PACKED] + STEP_BYTES * (n_tiles * (chunk // DEPTH) + tile * _steps(length))
            for entry in range(chunk, chunk + length, DEPTH):
                at = source + tile * SIDE * across + entry * along
                _pack_one(at, across, along, left, chunk + length - entry, out, is_column)
                out += STEP_BYTES


@compiled("void(int64[::1], int64, int64, int64, int64, int64, int64)", fastmath=set(), inline=True)
def _exchange(
    task: Longs, block: int, row: int, last_row: int, column: int, last_column: int, put: int
) -> None:
    """Write one block of results (`put` is 1), or read what is there (0)."""
    n_rows, n_columns = min(SIDE, last_row - row), min(SIDE, last_column - column)
    if n_rows <= 0 or n_columns <= 0:
        return
    out, stride = task[OUT] + row * task[OUT_ROW] + column * task[OUT_COLUMN], task[OUT_ROW]
    turned = task[OUT_COLUMN] != 4
    if turned:
        stride, n_rows, n_columns = task[OUT_COLUMN], n_columns, n_rows
    if put:
        if turned:
            transpose(block, block)
        move(block, LINE, out, stride, n_rows, n_columns)
    else:
        move(out, stride, block, LINE, n_rows, n_columns)
        if turned:
            transpose(block, block)


@compiled(
    "void(int64[::1], int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)",
    fastmath=set(),
    inline=True,
)
def _square(
    task: Longs,
    a: int,
    b: int,
    steps: int,
    row: int,
    last_row: int,
    column: int,
    last_column: int,
    chunk: int,
    own: int,
    ahead: int,
) -> None:
    """Compute AT_ONCE rows and columns of results over a chunk of entries.

    Args:
        task: the task.
        a: address of the parts of the rows, two blocks after each other.
        b: of the columns.
        steps: of the chunk.
        row: the first row.
        last_row: where rows end.
        column: the first column.
        last_column: where columns end.
        chunk: the first entry of the chunk; sums go on from the result, if it is not 0.
        own: address of the thread's own memory: a line of zeros, two for a bias, four blocks.
        ahead: address of what is wanted next.
    """
    other = steps * STEP_BYTES
    out, stride = task[OUT] + row * task[OUT_ROW] + column * task[OUT_COLUMN], task[OUT_ROW]
    whole = row + AT_ONCE <= last_row and column + AT_ONCE <= last_column
    given, block = own + LINE, own + 3 * LINE
    start, start_stride, right, below = own, 0, 0, 0
    if chunk == 0 and task[BIAS]:
        start, right = task[BIAS] + 4 * column, LINE
        if not whole:
            n = min(AT_ONCE, last_column - column)
            move(start, 0, given, 0, 1, min(n, SIDE))
            move(start + LINE, 0, given + LINE, 0, 1, max(n - SIDE, 0))
            start = given
    if whole and task[OUT_COLUMN] == 4:
        if chunk:
            start, start_stride, right, below = out, stride, LINE, SIDE * stride
        blocks(
            a, a + other, b, b + other, steps, start, start_stride, right, below,
            out, stride, LINE, SIDE * stride, ahead,
        )  # fmt: skip
        return
    if chunk:
        start, start_stride, right, below = block, LINE, PART_BYTES, 2 * PART_BYTES
        for which in range(4):
            _exchange(
                task, block + which * PART_BYTES, row + which // 2 * SIDE, last_row,
                column + which % 2 * SIDE, last_column, 0,
            )  # fmt: skip
    blocks(
        a, a + other, b, b + other, steps, start, start_stride, right, below,
        block, LINE, PART_BYTES, 2 * PART_BYTES, ahead,
    )  # fmt: skip
    for which in range(4):
        _exchange(
            task, block + which * PART_BYTES, row + which // 2 * SIDE, last_row,
            column + which % 2 * SIDE, last_column, 1,
        )  # fmt: skip


@compiled("void(int64[::1])", fastmath=set())
def multiply(task: Longs) -> None:
    """Take panels of rows until none is left, B being packed; or of columns, if A is."""
    n_rows, n_columns, n_entries = task[N_ROWS], task[N_COLUMNS], task[N_ENTRIES]
    by_rows = task[COLUMNS_PACKED] == 1
    if by_rows:
        source, across, along, n, n_tiles = (
            task[A], task[A_ROW], task[A_ENTRY], n_rows, _tiles(n_columns)
        )  # fmt: skip
    else:
        source, across, along, n, n_tiles = (
            task[B], task[B_COLUMN], task[B_ENTRY], n_columns, _tiles(n_rows)
        )  # fmt: skip
    # In squares, shared out evenly: a panel that is larger than the others is waited for.
    n_squares, n_panels = (n + AT_ONCE - 1) // AT_ONCE, task[N_PANELS]
    size = (n_squares + n_panels - 1) // n_panels * AT_ONCE
    memory = np.empty(
        size * min(CHUNK // DEPTH, _steps(n_entries)) * (STEP_BYTES // SIDE)
        + 5 * LINE
        + 4 * PART_BYTES,
        np.uint8,
    )
    layout = memory.ctypes.data + -memory.ctypes.data % LINE
    own, panel = layout + LINE, layout + 4 * LINE + 4 * PART_BYTES
    memory[: 5 * LINE] = 0
    for register in range(8):
        memory[layout - memory.ctypes.data + 16 + 2 * register] = LINE
        memory[layout - memory.ctypes.data + 48 + register] = SIDE
    memory[layout - memory.ctypes.data] = 1
    configure(layout)
    counter = task.ctypes.data + 8 * NEXT
    while True:
        number = take(counter)
        if number >= n_panels:
            break
        first = number * n_squares // n_panels * AT_ONCE
        last = min((number + 1) * n_squares // n_panels * AT_ONCE, n)
        last_row, last_column = (last, n_columns) if by_rows else (n_rows, last)
        for chunk in range(0, n_entries, CHUNK):
            length = min(CHUNK, n_entries - chunk)
            steps = _steps(length)
            out = panel
            for mine in range(first, last, SIDE):
                for entry in range(chunk, chunk + length, DEPTH):
                    _pack_one(
                        source + mine * across + entry * along, across, along,
                        last - mine, chunk + length - entry, out, 0 if by_rows else 1,
                    )  # fmt: skip
                    out += STEP_BYTES
            tile_bytes = steps * STEP_BYTES
            for tile in range(0, n_tiles, 2):
                other = task[PACKED] + STEP_BYTES * n_tiles * (chunk // DEPTH) + tile * tile_bytes
                ahead = other + 2 * tile_bytes
                for mine in range(first, last, AT_ONCE):
                    row, column = (mine, tile * SIDE) if by_rows else (tile * SIDE, mine)
                    here = panel + (mine - first) // SIDE * tile_bytes
                    a, b = (here, other) if by_rows else (other, here)
                    _square(
                        task, a, b, steps, row, last_row, column, last_column, chunk, own, ahead
                    )
                    ahead += AHEAD * LINE * steps
    release()
    memory[0] = 0  # until here numba must not free what is used by its address


@callback("void(CPointer(int64))")
def pack_at(address: Longs) -> None:
    """Do what `pack` does, for the task at an address."""
    pack(as_array(address, (FIELDS,)))


@callback("void(CPointer(int64))")
def multiply_at(address: Longs) -> None:
    """Do what `multiply` does, for the task at an address."""
    multiply(as_array(address, (FIELDS,)))
