"""Vectors of 16 numbers, and the instructions of matrix units (AMX), for loops of numba.

A register of these units has 16 lines of 64 bytes. Addresses, counts and distances in bytes are
integers; nothing here checks them. numba's cache on the disk knows a loop by the age of the file
that the loop is in: after a change here, the files that use it want a new date.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

from numba.core import types
from numba.extending import intrinsic

ir: Any = importlib.import_module("llvmlite.ir")

SIDE = 16  # lines of a register, rows or columns of a block, numbers of 4 bytes in a vector
LINE = 64
AT_ONCE = 2 * SIDE  # rows, and columns, of results that are computed together
AHEAD = 12  # lines of the next columns (or rows) fetched in a step: all of them in a panel

LONG, INT, SHORT, BYTE, BIT = (ir.IntType(bits) for bits in (64, 32, 16, 8, 1))
POINTER, VOID = ir.PointerType(), ir.VoidType()
FLOATS, WORDS = ir.VectorType(ir.FloatType(), SIDE), ir.VectorType(INT, SIDE)
_ZEROS = ir.Constant(FLOATS, [0.0] * SIDE)


def written(write: Callable[..., Any], n_arguments: int, returns: Any = types.void) -> Any:
    """Return what numba wants of an intrinsic: its signature, and the function that writes it."""

    def generate(context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        found = write(builder, *given)
        return context.get_dummy_value() if returns is types.void else found

    return returns(*[types.int64] * n_arguments), generate


def call(builder: Any, name: str, returns: Any, *given: Any) -> Any:
    """Call an instruction by LLVM's name for it."""
    kind = ir.FunctionType(returns, [each.type for each in given])
    known = builder.module.globals.get(name)
    function = known if known is not None else ir.Function(builder.module, kind, name)
    return builder.call(function, given)


def pointer_to(builder: Any, address: Any) -> Any:
    """Return what points to an address."""
    return builder.inttoptr(address, POINTER)


def plus(builder: Any, address: Any, distance: int) -> Any:
    """Return the address so many bytes further."""
    return builder.add(address, LONG(distance))


def fetch(builder: Any, address: Any, *, nearest: bool = True, to_write: bool = False) -> None:
    """Bring a line to the nearest or the second cache; an address of nothing does no harm."""
    kind, cache, data = INT(1 if to_write else 0), INT(3 if nearest else 2), INT(1)
    call(builder, "llvm.prefetch.p0", VOID, pointer_to(builder, address), kind, cache, data)


def share(n: int, turn: int, n_turns: int) -> range:
    """Return which of n things are done in a turn, where turns share them evenly."""
    return range(turn * n // n_turns, (turn + 1) * n // n_turns)


def repeat(builder: Any, times: Any, write: Callable[[Any], None]) -> None:
    """Write a loop over 0, 1, ... `times` - 1, at least once."""
    before, body = builder.basic_block, builder.append_basic_block("repeat")
    after = builder.append_basic_block("after")
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(LONG)
    index.add_incoming(LONG(0), before)
    write(index)
    following = builder.add(index, LONG(1))
    index.add_incoming(following, builder.basic_block)
    builder.cbranch(builder.icmp_signed("<", following, times), body, after)
    builder.position_at_end(after)


def mask_of(builder: Any, count: Any) -> Any:
    """Return a mask of the first `count` of SIDE entries."""
    one = builder.insert_element(
        ir.Constant(WORDS, ir.Undefined), builder.trunc(count, INT), INT(0)
    )
    everywhere = builder.shuffle_vector(one, one, ir.Constant(WORDS, [0] * SIDE))
    return builder.icmp_signed("<", ir.Constant(WORDS, list(range(SIDE))), everywhere)


def load(builder: Any, address: Any, mask: Any) -> Any:
    """Read 16 floats; those that the mask leaves out are zeros, wherever they would lie."""
    name, where = "llvm.masked.load.v16f32.p0", pointer_to(builder, address)
    return call(builder, name, FLOATS, where, INT(4), mask, _ZEROS)


def store(builder: Any, vector: Any, address: Any, mask: Any) -> None:
    """Write those of 16 floats that the mask leaves in."""
    name, where = "llvm.masked.store.v16f32.p0", pointer_to(builder, address)
    call(builder, name, VOID, vector, where, INT(4), mask)


def number_at(builder: Any, address: Any) -> Any:
    """Return the float at an address."""
    found = builder.load(builder.inttoptr(address, ir.FloatType().as_pointer()))
    found.align = 4
    return found


def everywhere(builder: Any, number: Any) -> Any:
    """Return a vector of one float, 16 times."""
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, INT(0))
    return builder.shuffle_vector(one, one, same(WORDS, 0))


def same(kind: Any, number: float) -> Any:
    """Return a vector of one constant, 16 times."""
    return ir.Constant(kind, [number] * SIDE)


def vector(builder: Any, address: Any, kind: Any = FLOATS) -> Any:
    """Read a vector at any place."""
    found = builder.load(builder.inttoptr(address, kind.as_pointer()))
    found.align = 4
    return found


def put(builder: Any, line: Any, address: Any) -> None:
    """Write a vector to the start of a line."""
    builder.store(line, builder.inttoptr(address, line.type.as_pointer())).align = LINE


def fma(builder: Any, one: Any, other: Any, added: Any) -> Any:
    """Return ``one * other + added``, rounded once."""
    return call(builder, "llvm.fma.v16f32", FLOATS, one, other, added)


def larger(builder: Any, one: Any, other: Any) -> Any:
    """Return the larger numbers of two vectors; where the first is NaN, the second."""
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def turned(builder: Any, lines: list[Any]) -> list[Any]:
    """Exchange lines and columns of 16 vectors."""
    lines = list(lines)
    # Squares of 8, 4, 2 and 1: those off the diagonal change places.
    size = SIDE // 2
    while size:
        low = [i if i & size == 0 else i - size + SIDE for i in range(SIDE)]
        high = [i + size if i & size == 0 else i + SIDE for i in range(SIDE)]
        for index in range(SIDE):
            if index & size == 0:
                pair = lines[index], lines[index + size]
                for place, order in ((index, low), (index + size, high)):
                    lines[place] = builder.shuffle_vector(*pair, ir.Constant(WORDS, order))
        size //= 2
    return lines


@intrinsic
def _lay_out(_typing: Any, layout: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Write at `layout` what `configure` reads: eight registers of 16 lines of 64 bytes."""

    def write(builder: Any, layout: Any) -> None:
        # Byte 0 is the kind; from 16 on there are two bytes of a line's length for each register,
        # from 48 on one byte of the number of its lines.
        numbers = [0] * LINE
        numbers[0] = 1
        for register in range(8):
            numbers[16 + 2 * register], numbers[48 + register] = LINE, SIDE
        kind = ir.VectorType(BYTE, LINE)
        where = builder.inttoptr(layout, kind.as_pointer())
        builder.store(ir.Constant(kind, numbers), where).align = LINE

    return written(write, 1)


@intrinsic
def _configure(_typing: Any, layout: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Give this thread eight registers of 16 lines of 64 bytes, as written at `layout`."""

    def write(builder: Any, at: Any) -> None:
        call(builder, "llvm.x86.ldtilecfg", VOID, pointer_to(builder, at))

    return written(write, 1)


@intrinsic
def _release(_typing: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Give the registers back."""

    def write(builder: Any) -> None:
        call(builder, "llvm.x86.tilerelease", VOID)

    return written(write, 0)


@intrinsic
def _transpose(_typing: Any, source: Any, out: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Exchange lines and columns of 16 lines of 16 numbers of 4 bytes; `out` may be `source`."""

    def write(builder: Any, source: Any, out: Any) -> None:
        pointer = WORDS.as_pointer()
        lines: list[Any] = []
        for index in range(SIDE):
            where = plus(builder, source, LINE * index)
            found = builder.load(builder.inttoptr(where, pointer))
            found.align = LINE
            lines.append(found)
        for index, found in enumerate(turned(builder, lines)):
            where = plus(builder, out, LINE * index)
            builder.store(found, builder.inttoptr(where, pointer)).align = LINE

    return written(write, 2)


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
        mask = mask_of(builder, width)

        def line(index: Any) -> None:
            found = load(builder, builder.add(source, builder.mul(index, stride)), mask)
            store(builder, found, builder.add(out, builder.mul(index, out_stride)), mask)

        repeat(builder, n_lines, line)

    return written(write, 6)


@intrinsic
def _clear(_typing: Any, lines: Any, n_lines: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
    """Write zeros to lines of 64 bytes, at least one."""

    def write(builder: Any, lines: Any, n_lines: Any) -> None:
        def line(index: Any) -> None:
            where = builder.add(lines, builder.mul(index, LONG(LINE)))
            builder.store(_ZEROS, builder.inttoptr(where, FLOATS.as_pointer())).align = LINE

        repeat(builder, n_lines, line)

    return written(write, 2)


Writes = Callable[..., None]
lay_out, configure = cast("Writes", _lay_out), cast("Writes", _configure)
release, clear = cast("Writes", _release), cast("Writes", _clear)
transpose, move = cast("Writes", _transpose), cast("Writes", _move)
