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

from functools import partial
from typing import Any, cast

import numpy as np
from numba.extending import intrinsic

from layerscope.products.compiling import Longs, as_array, callback, compiled, take
from layerscope.products.instructions import (
    AHEAD,
    AT_ONCE,
    BIT,
    BYTE,
    FLOATS,
    INT,
    LINE,
    LONG,
    SHORT,
    SIDE,
    VOID,
    WORDS,
    Writes,
    call,
    clear,
    configure,
    fetch,
    ir,
    lay_out,
    load,
    mask_of,
    move,
    plus,
    pointer_to,
    release,
    repeat,
    share,
    transpose,
    written,
)
from layerscope.products.tasks import (
    A_ENTRY,
    A_ROW,
    B_COLUMN,
    B_ENTRY,
    BIAS,
    COLUMNS_PACKED,
    FIELDS,
    N_COLUMNS,
    N_ENTRIES,
    N_PANELS,
    N_ROWS,
    NEXT,
    OUT,
    OUT_COLUMN,
    OUT_ROW,
    PACKED,
    A,
    B,
    tiles,
)

DEPTH = 32  # entries that are added up at a time
PARTS = 3
PART_BYTES = SIDE * LINE
STEP_BYTES = PARTS * PART_BYTES  # of one factor, over DEPTH entries

_HALVES = ir.VectorType(SHORT, 2 * SIDE)

CHUNK = 768  # entries added up at a time: with PANEL rows, their parts fit in the second cache
# Which part of A meets which of B, 0 the largest. What is left out is below 2 ** -20 of a product.
# From one pair to the next one factor stays, so that few registers are read again.
_PAIRS = ((0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0))


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
                    found = builder.load(builder.inttoptr(address, FLOATS.as_pointer()))
                    found.align = 4
                else:
                    there = builder.icmp_signed("<", index, count)
                    count = builder.select(there, width, LONG(0))
                    found = load(builder, address, mask_of(builder, count))
                rests.append(found)
            upper = ir.Constant(WORDS, [0xFFFF0000] * SIDE)
            at = builder.add(out, builder.mul(index, LONG(LINE)))
            for part in range(PARTS):
                halves = [builder.bitcast(rest, _HALVES) for rest in rests]
                chosen = ir.Constant(ir.VectorType(INT, 2 * SIDE), order)
                packed = builder.shuffle_vector(*halves, chosen)
                where = plus(builder, at, part * PART_BYTES)
                builder.store(packed, builder.inttoptr(where, _HALVES.as_pointer())).align = LINE
                if part < PARTS - 1:
                    cut = [builder.and_(builder.bitcast(rest, WORDS), upper) for rest in rests]
                    rests = [
                        builder.fsub(rest, builder.bitcast(large, FLOATS))
                        for rest, large in zip(rests, cut, strict=True)
                    ]

        uppers = [2 * index + 1 for index in range(2 * SIDE)]
        orders = {0: uppers, 1: [uppers[i // 2 + SIDE * (i % 2)] for i in range(2 * SIDE)]}
        counts = builder.add(n_first, n_second), builder.add(width_first, width_second)
        whole = builder.and_(
            *[builder.icmp_signed("==", count, LONG(2 * SIDE)) for count in counts]
        )
        done = builder.append_basic_block("split")
        for alternately, order in orders.items():
            for complete in (1, 0):
                mine, other = (builder.append_basic_block("case") for _ in range(2))
                asked = builder.icmp_signed("==", side_by_side, LONG(alternately))
                fits = builder.icmp_signed("==", whole, BIT(complete))
                builder.cbranch(builder.and_(asked, fits), mine, other)
                builder.position_at_end(mine)
                repeat(builder, LONG(SIDE), partial(line, order=order, whole=bool(complete)))
                builder.branch(done)
                builder.position_at_end(other)
        builder.branch(done)
        builder.position_at_end(done)

    return written(write, 9)


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
                where = pointer_to(builder, plus(builder, begin, part * PART_BYTES))
                call(builder, "llvm.x86.tileloadd64", VOID, BYTE(register), where, LONG(LINE))

        def step(index: Any) -> None:
            distance = builder.mul(index, LONG(STEP_BYTES))
            left = tuple(builder.add(begin, distance) for begin in (a, next_a))
            right = tuple(builder.add(begin, distance) for begin in (b, next_b))
            held: tuple[int, int] | tuple[None, None] = None, None
            soon = [
                plus(builder, begin, STEP_BYTES + line * LINE)
                for line in range(STEP_BYTES // LINE)
                for begin in (*left, *right)
            ]
            later = builder.add(ahead, builder.mul(index, LONG(AHEAD * LINE)))
            turns = [(pair, target) for pair in _PAIRS for target in sums]
            for turn, (pair, target) in enumerate(turns):
                if pair[0] != held[0]:
                    read(rows, left, pair[0])
                if pair[1] != held[1]:
                    read(columns, right, pair[1])
                held = pair
                registers = target, rows[target // 2], columns[target % 2]
                numbers = [BYTE(register) for register in registers]
                call(builder, "llvm.x86.tdpbf16ps", VOID, *numbers)
                for line in share(len(soon), turn, len(turns)):
                    fetch(builder, soon[line])
                for line in share(AHEAD, turn, len(turns)):
                    fetch(builder, plus(builder, later, line * LINE), nearest=False)

        def place(begin: Any, right: Any, below: Any, register: int) -> Any:
            if register // 2:
                begin = builder.add(begin, below)
            return pointer_to(builder, builder.add(begin, right) if register % 2 else begin)

        for register in sums:
            where = place(start, start_right, start_below, register)
            call(builder, "llvm.x86.tileloadd64", VOID, BYTE(register), where, start_stride)
        repeat(builder, steps, step)
        for register in sums:
            where = place(out, out_right, out_below, register)
            call(builder, "llvm.x86.tilestored64", VOID, BYTE(register), where, out_stride)

    return written(write, 14)


split, blocks = cast("Writes", _split), cast("Writes", _blocks)


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


@compiled("void(int64[::1])", fastmath=set())
def pack(task: Longs) -> None:
    """Write the parts of B, or of A, chunk after chunk of its entries, 16 columns at a time."""
    n_entries, is_column = task[N_ENTRIES], task[COLUMNS_PACKED]
    if is_column == 1:
        source, across, along, n = task[B], task[B_COLUMN], task[B_ENTRY], task[N_COLUMNS]
    else:
        source, across, along, n = task[A], task[A_ROW], task[A_ENTRY], task[N_ROWS]
    n_tiles = tiles(n)
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
            task[A], task[A_ROW], task[A_ENTRY], n_rows, tiles(n_columns)
        )  # fmt: skip
    else:
        source, across, along, n, n_tiles = (
            task[B], task[B_COLUMN], task[B_ENTRY], n_columns, tiles(n_rows)
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
    clear(own, 3)
    lay_out(layout)
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
