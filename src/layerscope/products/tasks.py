"""What loops on matrix units are told: a row of integers, the same for every kind of part."""

from __future__ import annotations

from layerscope.products.compiling import compiled
from layerscope.products.instructions import AT_ONCE

PANEL = 256  # rows (or columns), at most, that one thread takes at a time

# The fields of a task. Scales and UNFIT concern 8-bit parts alone.
(
    A, A_ROW, A_ENTRY, B, B_COLUMN, B_ENTRY, OUT, OUT_ROW, OUT_COLUMN, BIAS,
    N_ROWS, N_COLUMNS, N_ENTRIES, PACKED, COLUMNS_PACKED, N_PANELS, NEXT,
    ROW_SCALES, COLUMN_SCALES, UNFIT, FIELDS,
) = range(21)  # fmt: skip


@compiled("int64(int64)", fastmath=set(), inline=True)
def tiles(n: int) -> int:
    """Return how many blocks side by side have room for n rows or columns, in pairs."""
    return (n + AT_ONCE - 1) // AT_ONCE * 2
