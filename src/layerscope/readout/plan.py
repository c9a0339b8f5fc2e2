"""How rows are packed into tiles that fit the byte budget and share their references.

A tile is a rectangle of groups x slots; one group holds rows that are compared with the same
reference, so that its logits are computed once and broadcast. The slots of a group are

    [the caller's rows ..., their counterparts in the other lens ..., the reference]

where the counterparts are there only if asked for, and the reference takes no slot of its own when
it is itself one of the caller's rows (it is then the last of them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from layerscope.errors import ConfigError

MIN_GROUP = 4  # two rows and their counterparts in the other lens
# Rows of logits of scratch per row that is being worked on (see `passes`): exponentials, one or two
# buffers, copies of what rows are compared with.
SCRATCH = 4
_WORKING_SET = 1 << 20  # logits that a worker holds: with their scratch they stay in a shared cache
_TILE_ROWS = 208  # more rows per product gain nothing on a CPU ...
_TILE_LOGITS = 208 * 32_000  # ... unless they are narrow,
_TILE_ROWS_IN_PARTS = 416  # unless each product takes the weights apart first (matrix units) ...
_TILE_LOGITS_IN_PARTS = 832 * 32_000  # ... which narrow ones let many rows share ...
_TILE_ROWS_CONVERTED = 2048  # ... or converts them
_SLICE_BYTES = 16 * 2**20  # of weights converted to float32 at a time


@dataclass(frozen=True)
class Tile:
    """One rectangle of rows.

    Attributes:
        slots: [group, slot] positions in the concatenation (hidden, reference rows, other lens).
        n_out: the first `n_out` slots of every group are the caller's rows.
        paired: the next `n_out` slots are the same rows of the other lens.
        reference: slot of the reference, or None.
    """

    slots: Int[Tensor, "group slot"]
    n_out: int
    paired: bool
    reference: int | None

    @property
    def own_reference(self) -> bool:
        """The reference is itself one of the caller's rows, the last of its group."""
        return self.reference is not None and self.reference < self.n_out


@dataclass(frozen=True)
class Budget:
    """How a number of bytes is spent, in rows of logits.

    Attributes:
        group: most slots in a group.
        rows: rows of logits in all: those of a tile and the scratch.
        tile: most slots in a tile, as far as speed is concerned.
        slice: tokens that a worker multiplies at a time: a fair share of the vocabulary, or fewer
            where their weights are converted to float32 first.
        d_vocab: width of a row.
        workers: how many parts of a tile are worked on at a time.
    """

    group: int
    rows: int
    tile: int
    slice: int
    d_vocab: int
    workers: int

    @staticmethod
    def of(
        budget_bytes: int,
        *,
        d_vocab: int,
        d_model: int,
        converted: bool,
        in_parts: bool = False,
        workers: int = 1,
    ) -> Budget:
        """Spend `budget_bytes`.

        Args:
            budget_bytes: how many.
            d_vocab: width of a row of logits.
            d_model: width of a row of weights.
            converted: whether weights are converted to float32.
            in_parts: whether the product takes them apart (see `matrix_units`).
            workers: how many may work at a time.

        Raises:
            ConfigError: it does not hold the smallest group.
        """
        converting = 0  # bytes of weights converted to float32
        tokens = d_vocab
        if converted:
            allowed = min(_SLICE_BYTES, budget_bytes // 4)
            tokens = max(1, allowed // (4 * d_model * workers))
            converting = 4 * d_model * tokens * workers
        rows = (budget_bytes - converting) // (4 * d_vocab)
        group = rows // (1 + SCRATCH)
        # Scratch for several workers must leave most of the room to the tile.
        workers = max(1, min(workers, rows // (4 * SCRATCH * max(1, _WORKING_SET // d_vocab))))
        tokens = min(tokens, -(-d_vocab // workers))
        if group < MIN_GROUP:
            need = 2 * 4 * d_vocab * MIN_GROUP * (1 + SCRATCH)
            raise ConfigError(
                f"budget_bytes={budget_bytes} is too small for rows of {d_vocab} logits; "
                f"pass at least {need}"
            )
        tile = max(_TILE_ROWS, _TILE_LOGITS // d_vocab)
        if converted or in_parts:
            apart = max(_TILE_ROWS_IN_PARTS, _TILE_LOGITS_IN_PARTS // d_vocab)
            tile = max(tile, _TILE_ROWS_CONVERTED if converted else apart)
        return Budget(group, rows, tile, tokens, d_vocab, workers)

    def worked_on(self, n_slots: int) -> int:
        """Return how many groups of `n_slots` the passes work on at a time."""
        wanted = max(n_slots, min(_WORKING_SET // self.d_vocab, self.group))
        return wanted // n_slots

    def in_tile(self, n_slots: int) -> int:
        """Return how many groups of `n_slots` make a tile."""
        left = self.rows - SCRATCH * n_slots * self.worked_on(n_slots) * self.workers
        return max(1, min(left, self.tile) // n_slots)


def plan(
    *,
    n_rows: int,
    index: Int[Tensor, " row"] | None,
    n_references: int | None,
    paired: bool,
    budget: Budget,
) -> list[Tile]:
    """Pack rows into tiles.

    Args:
        n_rows: number of the caller's rows.
        index: reference of each row, -1 for none; None when there are no references.
        n_references: number of separate reference rows, or None when `index` points to rows.
        paired: each row has a counterpart in another lens.
        budget: how large groups and tiles may be.
    """
    other = n_rows + (n_references or 0)
    shapes: dict[tuple[int, int | None], list[list[int]]] = {}
    for target, members in _groups(n_rows, index):
        for slots, n_out, reference in _segments(
            members,
            target,
            n_rows=n_rows,
            separate=n_references is not None,
            room=budget.group,
            paired=paired,
        ):
            if paired:
                slots[n_out:n_out] = [other + row for row in slots[:n_out]]
                if reference is not None and reference >= n_out:
                    reference += n_out
            shapes.setdefault((n_out, reference), []).append(slots)
    tiles: list[Tile] = []
    for (n_out, reference), groups in shapes.items():
        size = budget.in_tile(len(groups[0]))
        for first in range(0, len(groups), size):
            slots = torch.tensor(groups[first : first + size], dtype=torch.long)
            tiles.append(Tile(slots, n_out, paired, reference))
    return tiles


def _groups(
    n_rows: int, index: Int[Tensor, " row"] | None
) -> Iterator[tuple[int | None, list[int]]]:
    """Yield (reference, rows that point to it); rows without one come one by one."""
    members: dict[int, list[int]] = {}
    for row, target in enumerate([-1] * n_rows if index is None else index.tolist()):
        members.setdefault(target, []).append(row)
    for target, rows in members.items():
        if target >= 0:
            yield target, rows
        else:
            for row in rows:
                yield None, [row]


def _segments(
    members: list[int],
    target: int | None,
    *,
    n_rows: int,
    separate: bool,
    room: int,
    paired: bool,
) -> Iterator[tuple[list[int], int, int | None]]:
    """Cut one group into segments of at most `room` slots: (slots, n_out, reference slot)."""
    if target is None:
        yield list(members), len(members), None
        return
    own = not separate and target in members
    rows = [row for row in members if row != target] if own else members
    slot = n_rows + target if separate else target
    size = max(1, (room - 1) // 2 - 1 if paired else room - 1)
    chunks = [rows[first : first + size] for first in range(0, len(rows), size)] or [[]]
    for chunk in chunks[:-1]:
        yield [*chunk, slot], len(chunk), len(chunk)
    last = chunks[-1]
    yield [*last, slot], len(last) + own, len(last)
