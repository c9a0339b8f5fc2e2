"""Float32 numbers as digits of 8 bits, and back: vector instructions for `amx_int8`.

A row is held as integers of 24 bits and one scale, its largest entry being about 2 ** 23, and these
in three digits of 8 bits, the first the largest. An entry that is small beside the largest of its
row loses bits, other than in float32. So a row whose largest entry is too large beside the rest is
left out: its scale is NaN, and so is what comes of it, for somebody else to compute.

All arguments are integers: addresses, counts, and distances in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from numba.core import types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic

from layerscope.products.instructions import (
    BYTE,
    FLOATS,
    INT,
    LINE,
    LONG,
    SHORT,
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
    vector,
    written,
)

DEPTH = 64  # entries that are added up at a time
DIGITS = 3
DIGIT_BYTES = SIDE * LINE
STEP_BYTES = DIGITS * DIGIT_BYTES  # of one factor, over DEPTH entries
MOST_DEPTH = 2**15  # entries of a row, of each of which three products are added up in 32 bits
SUMS = 3  # products of digits are added up apart by their size

# The square of a row's largest entry over the sum of its squares, at most; and of a column's, over
# their mean. What is added up in rows, activations, is often less even than weights.
MOST_OF_ROW, MOST_OF_COLUMN = 0.16, 36.0
_LEAST, _MOST = 2.0**-60, 2.0**60  # of a largest entry
# Of 24 bits in digits from -128 to 127 that is 127 * (2 ** 16 + 2 ** 8 + 1), less some rounding.
LARGEST = 8355000.0

GROUP = 4  # times 16 rows that are taken apart together

_SOON = 16  # lines that `measure` fetches before it reads them

_BYTES = ir.VectorType(BYTE, LINE)


def _measuring(builder: Any, *given: Any, copying: bool) -> None:
    """Find the largest sizes, and the sums of squares, of lines of 64 places.

    Args:
        builder: writes the instructions.
        given: address of the first line; from one line to the next; how many lines, at least one;
            how many floats of each, 64 at most, the others counting as zeros; how many of the last
            line; address of 64 largest sizes, the sums being DIGIT_BYTES behind them; address of
            a copy of the lines, if there is to be one.
        copying: whether there is.
    """
    lines, stride, n_lines, width, last_width, out, *copy = given
    parts = range(GROUP)
    largest, squares = ([alloca_once(builder, FLOATS) for _ in parts] for _ in range(2))
    for place in (*largest, *squares):
        builder.store(same(FLOATS, 0.0), place)
    ahead = builder.mul(stride, LONG(_SOON))

    def line(index: Any, *, width: Any) -> None:
        start = builder.add(lines, builder.mul(index, stride))
        for part in parts:
            address = plus(builder, start, part * LINE)
            fetch(builder, builder.add(address, ahead))
            found = load(builder, address, mask_of(builder, plus(builder, width, -part * SIDE)))
            if copying:
                to = builder.add(copy[0], builder.mul(index, LONG(GROUP * LINE)))
                put(builder, found, plus(builder, to, part * LINE))
            size = call(builder, "llvm.fabs.v16f32", FLOATS, found)
            builder.store(larger(builder, size, builder.load(largest[part])), largest[part])
            total = fma(builder, found, found, builder.load(squares[part]))
            builder.store(total, squares[part])

    last = plus(builder, n_lines, -1)
    with builder.if_then(builder.icmp_signed(">", last, LONG(0))):
        repeat(builder, last, partial(line, width=width))
    line(last, width=last_width)
    for part in parts:
        for where, places in ((out, largest), (plus(builder, out, DIGIT_BYTES), squares)):
            put(builder, builder.load(places[part]), plus(builder, where, part * LINE))


@intrinsic
def _measure(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, lines: Any, stride: Any, n_lines: Any, width: Any, last_width: Any, out: Any
) -> Any:
    """See `_measuring`."""
    return written(partial(_measuring, copying=False), 6)


@intrinsic
def _measure_and_copy(  # pyright: ignore[reportUnusedFunction]
    _typing: Any,
    lines: Any,
    stride: Any,
    n_lines: Any,
    width: Any,
    last_width: Any,
    out: Any,
    copy: Any,
) -> Any:
    """See `_measuring`."""
    return written(partial(_measuring, copying=True), 7)


@intrinsic
def _fold(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, lines: Any, n_lines: Any, out: Any
) -> Any:
    """Put what `_measure` found in some lines of 16 places together, in one of each kind."""

    def write(builder: Any, lines: Any, n_lines: Any, out: Any) -> None:
        places = [alloca_once(builder, FLOATS) for _ in range(2)]
        for place in places:
            builder.store(same(FLOATS, 0.0), place)
        largest, squares = places

        def line(index: Any) -> None:
            where = builder.add(lines, builder.mul(index, LONG(LINE)))
            before, found = builder.load(largest), vector(builder, where, FLOATS)
            builder.store(larger(builder, found, before), largest)
            found = vector(builder, plus(builder, where, DIGIT_BYTES), FLOATS)
            builder.store(builder.fadd(builder.load(squares), found), squares)

        repeat(builder, n_lines, line)
        for which, place in enumerate(places):
            put(builder, builder.load(place), plus(builder, out, which * DIGIT_BYTES))

    return written(write, 3)


@intrinsic
def _fit(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, found: Any, n: Any, n_entries: Any, is_column: Any, factors: Any, scales: Any
) -> Any:
    """Write what 16 rows are multiplied by to become integers, and what undoes it.

    Args:
        found: address of their largest sizes and sums of squares, see `_measure`.
        n: how many rows there are.
        n_entries: of each.
        is_column: 1 for columns of B, 0 for rows of A.
        factors: address of the 16 factors.
        scales: address of the n scales: for sums of products of the largest digits.

    Returns:
        how many rows are left out: their factor is 0, their scale NaN
    """

    def write(
        builder: Any,
        found: Any,
        n: Any,
        n_entries: Any,
        is_column: Any,
        factors: Any,
        scales: Any,
    ) -> Any:
        largest = vector(builder, found, FLOATS)
        squares = vector(builder, plus(builder, found, DIGIT_BYTES), FLOATS)
        of_column = builder.fdiv(
            ir.Constant(ir.FloatType(), MOST_OF_COLUMN), builder.sitofp(n_entries, ir.FloatType())
        )
        most = builder.select(
            builder.icmp_signed("==", is_column, LONG(1)),
            of_column,
            ir.Constant(ir.FloatType(), MOST_OF_ROW),
        )
        allowed = builder.fmul(squares, everywhere(builder, most))
        even = builder.fcmp_ordered("<=", builder.fmul(largest, largest), allowed)
        for relation, limit in ((">=", _LEAST), ("<=", _MOST)):
            inside = builder.fcmp_ordered(relation, largest, same(FLOATS, limit))
            even = builder.and_(even, inside)
        # Zeros alone are no difficulty; NaN is not zero.
        nothing = builder.fcmp_ordered("==", squares, same(FLOATS, 0.0))
        nothing = builder.and_(nothing, builder.fcmp_ordered("==", largest, same(FLOATS, 0.0)))
        zero, nan = same(FLOATS, 0.0), same(FLOATS, float("nan"))
        factor = builder.fdiv(same(FLOATS, LARGEST), largest)
        scale = builder.fmul(largest, same(FLOATS, 65536.0 / LARGEST))
        everything, there = mask_of(builder, LONG(SIDE)), mask_of(builder, n)
        store(builder, builder.select(even, factor, zero), factors, everything)
        unfit = builder.select(nothing, zero, nan)
        store(builder, builder.select(even, scale, unfit), scales, there)
        missing = builder.and_(builder.not_(builder.or_(even, nothing)), there)
        bits = builder.bitcast(missing, SHORT)
        return builder.zext(call(builder, "llvm.ctpop.i16", SHORT, bits), LONG)

    return written(write, 6, types.int64)


def _in_digits(builder: Any, found: Any, factor: Any) -> Any:
    """Return what 16 floats are as integers, byte by byte, the last digit first."""
    scaled = builder.fmul(found, factor)
    name, nothing = "llvm.x86.avx512.mask.cvtps2dq.512", ir.Constant(WORDS, [0] * SIDE)
    whole = call(builder, name, WORDS, scaled, nothing, SHORT(-1), INT(4))  # to the nearest
    # Bytes go from 0 to 255, digits from -128 to 127.
    middle = ir.Constant(WORDS, [0x808080] * SIDE)
    return builder.xor(builder.add(whole, middle), middle)


def _gathered(builder: Any, wholes: list[Any], *, side_by_side: bool) -> list[Any]:
    """Return the digits of four times 16 integers, those of one kind together.

    They stand one vector after the other, or number by number of all four vectors.
    """
    size = 2 * SIDE
    chosen = ir.VectorType(INT, LINE)

    def of_two(pair: list[Any], kinds: tuple[int, int]) -> Any:
        numbers = [SIDE * (i % 2) + i // 2 if side_by_side else i for i in range(size)]
        order = [4 * number + DIGITS - 1 - kind for kind in kinds for number in numbers]
        return builder.shuffle_vector(*pair, ir.Constant(chosen, order))

    low, high = ([of_two(wholes[i : i + 2], kinds) for i in (0, 2)] for kinds in ((2, 1), (0, 0)))
    found: list[Any] = []
    for halves, start in ((high, 0), (low, size), (low, 0)):
        if side_by_side:
            order = [2 * (i // 4) + i % 2 + LINE * (i % 4 // 2) for i in range(LINE)]
        else:
            order = [i % size + LINE * (i // size) for i in range(LINE)]
        order = [start + each for each in order]
        found.append(builder.shuffle_vector(*halves, ir.Constant(chosen, order)))
    return found


@intrinsic
def _digits_along(  # pyright: ignore[reportUnusedFunction]
    _typing: Any,
    source: Any,
    stride: Any,
    factors: Any,
    n: Any,
    n_entries: Any,
    ahead: Any,
    out: Any,
) -> Any:
    """Write the digits of 16 rows over DEPTH entries that lie side by side, a row in a line.

    Args:
        source: address of the first entry.
        stride: from one row to the next.
        factors: address of what each row is multiplied by.
        n: how many rows there are; the others are zeros.
        n_entries: how many entries there are; the others are zeros.
        ahead: distance to what will be read later, and is fetched meanwhile.
        out: address of the digits.
    """

    def write(builder: Any, *given: Any) -> None:
        source, stride, factors, n, n_entries, ahead, out = given

        def line(index: Any) -> None:
            start = builder.add(source, builder.mul(index, stride))
            to = builder.add(out, builder.mul(index, LONG(LINE)))
            there = builder.icmp_signed("<", index, n)
            count = builder.select(there, n_entries, LONG(0))
            where = builder.add(factors, builder.mul(index, LONG(4)))
            factor = everywhere(builder, number_at(builder, where))
            wholes: list[Any] = []
            for part in range(DEPTH // SIDE):
                mask = mask_of(builder, plus(builder, count, -part * SIDE))
                address = plus(builder, start, part * LINE)
                fetch(builder, builder.add(address, ahead), nearest=False)
                found = load(builder, address, mask)
                whole = _in_digits(builder, found, factor)
                wholes.append(builder.bitcast(whole, _BYTES))
            for digit, digits in enumerate(_gathered(builder, wholes, side_by_side=False)):
                put(builder, digits, plus(builder, to, digit * DIGIT_BYTES))

        repeat(builder, LONG(SIDE), line)

    return written(write, 7)


@intrinsic
def _digits_across(  # pyright: ignore[reportUnusedFunction]
    _typing: Any, source: Any, stride: Any, factors: Any, n: Any, n_entries: Any, out: Any
) -> Any:
    """Write the digits of 16 columns that lie side by side, four entries of each in a line.

    Args:
        source: address of the first entry.
        stride: from one entry to the next.
        factors: address of what each column is multiplied by.
        n: how many columns there are; the others are zeros.
        n_entries: how many entries there are; the others are zeros.
        out: address of the digits.
    """

    def write(builder: Any, *given: Any) -> None:
        source, stride, factors, n, n_entries, out = given
        factor = vector(builder, factors, FLOATS)

        def line(index: Any) -> None:
            to, wholes = builder.add(out, builder.mul(index, LONG(LINE))), []
            for entry in range(4):
                number = plus(builder, builder.mul(index, LONG(4)), entry)
                there = builder.icmp_signed("<", number, n_entries)
                mask = mask_of(builder, builder.select(there, n, LONG(0)))
                found = load(builder, builder.add(source, builder.mul(number, stride)), mask)
                wholes.append(builder.bitcast(_in_digits(builder, found, factor), _BYTES))
            for digit, digits in enumerate(_gathered(builder, wholes, side_by_side=True)):
                put(builder, digits, plus(builder, to, digit * DIGIT_BYTES))

        repeat(builder, LONG(SIDE), line)

    return written(write, 6)


@intrinsic
def _combine(  # pyright: ignore[reportUnusedFunction]
    _typing: Any,
    sums: Any,
    row_scales: Any,
    column_scales: Any,
    bias: Any,
    out: Any,
    stride: Any,
    n_lines: Any,
    width: Any,
) -> Any:
    """Write one block of results.

    Args:
        sums: address of its three sums.
        row_scales: of what its rows are multiplied by.
        column_scales: of what its columns are.
        bias: of what is added to every row, or 0.
        out: of the first result.
        stride: from one row of results to the next.
        n_lines: how many rows, at least one.
        width: how many columns, 16 at most.
    """

    def write(builder: Any, *given: Any) -> None:
        sums, row_scales, column_scales, bias, out, stride, n_lines, width = given
        mask = mask_of(builder, width)
        columns = load(builder, column_scales, mask)
        has_bias = builder.icmp_signed("!=", bias, LONG(0))
        added = load(builder, bias, mask_of(builder, builder.select(has_bias, width, LONG(0))))

        def line(index: Any) -> None:
            start = builder.add(sums, builder.mul(index, LONG(LINE)))
            total = None
            for which in reversed(range(SUMS)):  # the smallest first
                found = vector(builder, plus(builder, start, which * DIGIT_BYTES), WORDS)
                size = builder.sitofp(found, FLOATS)
                below = same(FLOATS, 2.0**-8)
                total = size if total is None else fma(builder, total, below, size)
            where = builder.add(row_scales, builder.mul(index, LONG(4)))
            scale = everywhere(builder, number_at(builder, where))
            scaled = builder.fmul(total, scale)
            result = fma(builder, scaled, columns, added)
            store(builder, result, builder.add(out, builder.mul(index, stride)), mask)

        repeat(builder, n_lines, line)

    return written(write, 8)


Fit = Callable[..., int]
measure, measure_and_copy = cast("Writes", _measure), cast("Writes", _measure_and_copy)
fold, fit = cast("Writes", _fold), cast("Fit", _fit)
combine = cast("Writes", _combine)
digits_along, digits_across = cast("Writes", _digits_along), cast("Writes", _digits_across)
