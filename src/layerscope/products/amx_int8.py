"""Float32 products on the matrix units of x86 CPUs (AMX) out of 8-bit integers, compiled loops.

Every row of A and every column of B is held in three `digits`. A block has 16 rows and 16 columns
and adds up ``A @ B`` over 64 entries at a time, in 32 bits and so without an error. One digit over
64 entries fills one register: in A a line has the 64 entries of one row; in B it has the entries
4 k to 4 k + 3 of the 16 columns, side by side. The three digits follow each other.

All arguments are integers: addresses, counts, and distances in bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
from numba.extending import intrinsic

from layerscope.products.compiling import Longs, add, as_array, callback, compiled, take
from layerscope.products.digits import (
    DEPTH,
    DIGIT_BYTES,
    DIGITS,
    GROUP,
    STEP_BYTES,
    SUMS,
    combine,
    digits_across,
    digits_along,
    fit,
    fold,
    measure,
    measure_and_copy,
)
from layerscope.products.instructions import (
    AHEAD,
    AT_ONCE,
    BYTE,
    LINE,
    LONG,
    SIDE,
    VOID,
    Writes,
    call,
    clear,
    configure,
    fetch,
    lay_out,
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
    COLUMN_SCALES,
    COLUMNS_PACKED,
    FIELDS,
    N_COLUMNS,
    N_ENTRIES,
    N_PANELS,
    N_ROWS,
    NEXT,
    OUT,
    OUT_ROW,
    PACKED,
    ROW_SCALES,
    UNFIT,
    A,
    B,
    tiles,
)

# Which digit of A meets which of B, and in which of three sums. What is left out is below 2 ** -24
# of the largest products. A register is read again as late as can be.
_PAIRS = ((0, 2), (0, 1), (1, 1), (1, 0), (0, 0), (2, 0))
_EXPECTED = 2  # rows of results that are fetched in a step, before they are written


def _block(builder: Any, *given: Any, new_rows: bool, new_columns: bool) -> None:
    """Add up one block over `steps` times DEPTH entries.

    Args:
        builder: writes the instructions.
        given: address of the digits of 16 rows, step after step; of 16 columns; how many steps;
            address of the three sums, the first of the largest products; address of the results,
            and from one row of them to the next; address of what is wanted next, AHEAD lines of
            which are fetched in each step.
        new_rows: the rows are read for the first time, so those of the next step are fetched.
        new_columns: the columns are.
    """
    a, b, steps, out, result, stride, ahead = given
    registers = {"a": (3, 4, 5), "b": (6, 7, 6)}  # of the digits of A; of B

    def read(register: int, begin: Any, digit: int) -> None:
        where = pointer_to(builder, plus(builder, begin, digit * DIGIT_BYTES))
        call(builder, "llvm.x86.tileloadd64", VOID, BYTE(register), where, LONG(LINE))

    def step(index: Any) -> None:
        distance = builder.mul(index, LONG(STEP_BYTES))
        left, right = builder.add(a, distance), builder.add(b, distance)
        fresh = [begin for begin, new in ((left, new_rows), (right, new_columns)) if new]
        lines = range(STEP_BYTES // LINE)
        soon = [plus(builder, each, STEP_BYTES + line * LINE) for line in lines for each in fresh]
        later = builder.add(ahead, builder.mul(index, LONG(AHEAD * LINE)))
        row = builder.mul(index, LONG(_EXPECTED))
        row = builder.select(builder.icmp_signed("<", row, LONG(SIDE)), row, LONG(0))
        for _ in range(_EXPECTED):
            fetch(builder, builder.add(result, builder.mul(row, stride)), to_write=True)
            row = plus(builder, row, 1)
        held: dict[int, int] = {}
        for turn, (one, other) in enumerate(_PAIRS):
            pair = registers["a"][one], registers["b"][other]
            for register, begin, digit in zip(pair, (left, right), (one, other), strict=True):
                if held.get(register) != digit:
                    read(register, begin, digit)
                    held[register] = digit
            numbers = [BYTE(each) for each in (one + other, *pair)]
            call(builder, "llvm.x86.tdpbssd", VOID, *numbers)
            for line in share(len(soon), turn, len(_PAIRS)):
                fetch(builder, soon[line])
            if not fresh:
                for line in share(AHEAD, turn, len(_PAIRS)):
                    fetch(builder, plus(builder, later, line * LINE), nearest=False)

    for which in range(SUMS):
        call(builder, "llvm.x86.tilezero", VOID, BYTE(which))
    repeat(builder, steps, step)
    for which in range(SUMS):
        where = pointer_to(builder, plus(builder, out, which * DIGIT_BYTES))
        call(builder, "llvm.x86.tilestored64", VOID, BYTE(which), where, LONG(LINE))


@intrinsic
def _first_block(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, a: Any, b: Any, steps: Any, out: Any, result: Any, stride: Any, ahead: Any
) -> Any:
    """Add up the first of four blocks, see `_block`."""
    return written(partial(_block, new_rows=True, new_columns=True), 7)


@intrinsic
def _right_block(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, a: Any, b: Any, steps: Any, out: Any, result: Any, stride: Any, ahead: Any
) -> Any:
    """Add up the block on its right: other columns."""
    return written(partial(_block, new_rows=False, new_columns=True), 7)


@intrinsic
def _lower_block(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, a: Any, b: Any, steps: Any, out: Any, result: Any, stride: Any, ahead: Any
) -> Any:
    """Add up the block below the first: other rows."""
    return written(partial(_block, new_rows=True, new_columns=False), 7)


@intrinsic
def _last_block(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, a: Any, b: Any, steps: Any, out: Any, result: Any, stride: Any, ahead: Any
) -> Any:
    """Add up the block whose rows and columns have both been read."""
    return written(partial(_block, new_rows=False, new_columns=False), 7)


first_block, right_block = cast("Writes", _first_block), cast("Writes", _right_block)
lower_block, last_block = cast("Writes", _lower_block), cast("Writes", _last_block)


@compiled("int64(int64)", fastmath=set(), inline=True)
def _steps(n_entries: int) -> int:
    return (n_entries + DEPTH - 1) // DEPTH


_OWN_BYTES = 5 * DIGIT_BYTES


@compiled("int64(int64, int64)", fastmath=set(), inline=True)
def _own_bytes(along: int, n_entries: int) -> int:
    """Return how much memory `_fit_rows` works in."""
    return _OWN_BYTES + (0 if along == 4 else n_entries * GROUP * LINE)


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64)", fastmath=set())
def _fit_rows(
    source: int,
    across: int,
    along: int,
    n: int,
    n_entries: int,
    is_column: int,
    scales: int,
    own: int,
) -> int:
    """Find the scales of some rows (or columns), GROUP times 16 at most.

    Args:
        source: address of the first entry.
        across: distance from one row to the next.
        along: distance from one entry to the next; `along` or `across` is 4.
        n: how many rows there are; at least 1.
        n_entries: of each; at least 1.
        is_column: 1 for columns of B, 0 for rows of A.
        scales: address of n scales.
        own: address of the factors, a line for 16 rows; behind DIGIT_BYTES of them is memory to
            work in, see `_own_bytes`. If entries do not lie side by side, rows are copied to its
            end, GROUP times 16 floats for each entry: what lies far apart is best read once.

    Returns:
        how many rows are left out
    """
    missing, found = 0, own + DIGIT_BYTES
    if along != 4:
        measure_and_copy(source, along, n_entries, n, n, found, own + _OWN_BYTES)
    n_lines = (n_entries + GROUP * SIDE - 1) // (GROUP * SIDE)
    last_width = n_entries - (n_lines - 1) * GROUP * SIDE
    for tile in range((n + SIDE - 1) // SIDE):
        here, left = found + tile * LINE, min(SIDE, n - tile * SIDE)
        if along == 4:
            here = found + 2 * DIGIT_BYTES
            clear(here, 2 * SIDE)
            for row in range(left):
                start = source + (tile * SIDE + row) * across
                measure(start, GROUP * LINE, n_lines, GROUP * SIDE, last_width, found)
                fold(found, GROUP, here + row * LINE)
            transpose(here, here)
            transpose(here + DIGIT_BYTES, here + DIGIT_BYTES)
            fold(here, SIDE, here)
        missing += fit(here, left, n_entries, is_column, own + tile * LINE, scales + tile * LINE)
    return missing


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64, int64)", fastmath=set())
def _take_apart(
    source: int,
    across: int,
    along: int,
    n: int,
    n_entries: int,
    is_column: int,
    scales: int,
    out: int,
    own: int,
) -> int:
    """Write scales and digits, 16 rows (or columns) after the other, see `_fit_rows`."""
    n = min(n, GROUP * SIDE)
    missing = _fit_rows(source, across, along, n, n_entries, is_column, scales, own)
    ahead = GROUP * SIDE * across
    for tile in range((n + SIDE - 1) // SIDE):
        left, factors = min(SIDE, n - tile * SIDE), own + tile * LINE
        for entry in range(0, n_entries, DEPTH):
            rest = n_entries - entry
            if along == 4:
                start = source + tile * SIDE * across + entry * along
                digits_along(start, across, factors, left, rest, ahead, out)
            else:
                start = own + _OWN_BYTES + tile * LINE + entry * GROUP * LINE
                digits_across(start, GROUP * LINE, factors, left, rest, out)
            if (along == 4) == (is_column == 1):
                for digit in range(DIGITS):
                    transpose(out + digit * DIGIT_BYTES, out + digit * DIGIT_BYTES)
            out += STEP_BYTES
    return missing


@compiled("int64(int64, int64, int64, int64, int64, int64, int64)", fastmath=set())
def unfit(
    source: int, across: int, along: int, n: int, n_entries: int, is_column: int, samples: int
) -> int:
    """Count who is left out in some groups of 16 rows (or columns), spread evenly over all."""
    memory = np.empty(_own_bytes(along, n_entries) + 2 * LINE, np.uint8)
    scales = memory.ctypes.data + -memory.ctypes.data % LINE
    own, found = scales + LINE, 0
    for sample in range(samples):
        row = (n - SIDE) * sample // max(samples - 1, 1) if n > SIDE else 0
        found += _fit_rows(
            source + row * across, across, along, min(n, SIDE), n_entries, is_column, scales, own
        )
    memory[0] = 0  # until here numba must not free what is used by its address
    return found


@compiled("void(int64[::1])", fastmath=set())
def pack(task: Longs) -> None:
    """Write the digits and scales of B, or of A, 16 columns at a time."""
    n_entries, is_column = task[N_ENTRIES], task[COLUMNS_PACKED]
    if is_column == 1:
        source, across, along, n = task[B], task[B_COLUMN], task[B_ENTRY], task[N_COLUMNS]
        scales = task[COLUMN_SCALES]
    else:
        source, across, along, n = task[A], task[A_ROW], task[A_ENTRY], task[N_ROWS]
        scales = task[ROW_SCALES]
    memory = np.empty(_own_bytes(along, n_entries) + LINE, np.uint8)
    own = memory.ctypes.data + -memory.ctypes.data % LINE
    counter, at_once = task.ctypes.data + 8 * NEXT, GROUP * SIDE
    tile_bytes = _steps(n_entries) * STEP_BYTES
    while True:
        number = take(counter) * at_once
        if number >= n:
            break
        missing = _take_apart(
            source + number * across,
            across,
            along,
            n - number,
            n_entries,
            is_column,
            scales + 4 * number,
            task[PACKED] + number // SIDE * tile_bytes,
            own,
        )
        if missing:
            add(task.ctypes.data + 8 * UNFIT, missing)
    memory[0] = 0  # until here numba must not free what is used by its address


@compiled(
    "void(int64[::1], int64, int64, int64, int64, int64, int64, int64, int64, int64)",
    fastmath=set(),
    inline=True,
)
def _square(
    task: Longs,
    a: int,
    b: int,
    tile_bytes: int,
    row: int,
    last_row: int,
    column: int,
    last_column: int,
    sums: int,
    ahead: int,
) -> None:
    """Compute AT_ONCE rows and columns of results.

    Args:
        task: the task.
        a: address of the digits of the rows, two blocks after each other.
        b: of the columns.
        tile_bytes: of the digits of a block.
        row: the first row.
        last_row: where rows end.
        column: the first column.
        last_column: where columns end.
        sums: address of memory for the sums of one block.
        ahead: address of what is wanted next.
    """
    steps, stride, bias = tile_bytes // STEP_BYTES, task[OUT_ROW], 0
    for block in range(4):
        top, left = row + block // 2 * SIDE, column + block % 2 * SIDE
        rows, columns = a + block // 2 * tile_bytes, b + block % 2 * tile_bytes
        out = task[OUT] + top * stride + 4 * left
        if block == 0:
            first_block(rows, columns, steps, sums, out, stride, ahead)
        elif block == 1:
            right_block(rows, columns, steps, sums, out, stride, ahead)
        elif block == 2:
            lower_block(rows, columns, steps, sums, out, stride, ahead)
        else:
            last_block(rows, columns, steps, sums, out, stride, ahead)
        n_lines, width = min(SIDE, last_row - top), min(SIDE, last_column - left)
        if n_lines > 0 and width > 0:
            row_scales, column_scales = task[ROW_SCALES] + 4 * top, task[COLUMN_SCALES] + 4 * left
            if task[BIAS]:
                bias = task[BIAS] + 4 * left
            combine(sums, row_scales, column_scales, bias, out, stride, n_lines, width)


@compiled("void(int64[::1])", fastmath=set())
def multiply(task: Longs) -> None:
    """Take panels of rows until none is left, B being packed; or of columns, if A is."""
    n_rows, n_columns, n_entries = task[N_ROWS], task[N_COLUMNS], task[N_ENTRIES]
    by_rows = task[COLUMNS_PACKED] == 1
    if by_rows:
        source, across, along, n, n_tiles, scales = (
            task[A], task[A_ROW], task[A_ENTRY], n_rows, tiles(n_columns), task[ROW_SCALES]
        )  # fmt: skip
    else:
        source, across, along, n, n_tiles, scales = (
            task[B], task[B_COLUMN], task[B_ENTRY], n_columns, tiles(n_rows), task[COLUMN_SCALES]
        )  # fmt: skip
    # In squares, shared out evenly: a panel that is larger than the others is waited for.
    n_squares, n_panels = (n + AT_ONCE - 1) // AT_ONCE, task[N_PANELS]
    size = (n_squares + n_panels - 1) // n_panels * AT_ONCE
    tile_bytes = _steps(n_entries) * STEP_BYTES
    own_bytes = _own_bytes(along, n_entries)
    memory = np.empty(
        2 * LINE + SUMS * DIGIT_BYTES + own_bytes + size // SIDE * tile_bytes, np.uint8
    )
    layout = memory.ctypes.data + -memory.ctypes.data % LINE
    sums = layout + LINE
    own = sums + SUMS * DIGIT_BYTES
    panel = own + own_bytes
    lay_out(layout)
    configure(layout)
    counter = task.ctypes.data + 8 * NEXT
    while True:
        number = take(counter)
        if number >= n_panels:
            break
        start = number * n_squares // n_panels * AT_ONCE
        last = min((number + 1) * n_squares // n_panels * AT_ONCE, n)
        last_row, last_column = (last, n_columns) if by_rows else (n_rows, last)
        for mine in range(start, last, GROUP * SIDE):
            missing = _take_apart(
                source + mine * across,
                across,
                along,
                last - mine,
                n_entries,
                0 if by_rows else 1,
                scales + 4 * mine,
                panel + (mine - start) // SIDE * tile_bytes,
                own,
            )
            if missing:
                add(task.ctypes.data + 8 * UNFIT, missing)
        for tile in range(0, n_tiles, 2):
            other = task[PACKED] + tile * tile_bytes
            ahead = other + 2 * tile_bytes
            for mine in range(start, last, AT_ONCE):
                row, column = (mine, tile * SIDE) if by_rows else (tile * SIDE, mine)
                here = panel + (mine - start) // SIDE * tile_bytes
                a, b = (here, other) if by_rows else (other, here)
                _square(task, a, b, tile_bytes, row, last_row, column, last_column, sums, ahead)
                ahead += AHEAD * LINE * _steps(n_entries)
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
