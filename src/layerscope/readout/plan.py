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


@dataclass(frozen=True)
class _Segment:
    slots: list[int]
    n_out: int
    own: bool


def plan(
    *,
    n_rows: int,
    index: Int[Tensor, " row"] | None,
    n_references: int | None,
    paired: bool,
    max_slots: int,
) -> Iterator[Tile]:
    """Pack rows into tiles of at most `max_slots` slots.

    Args:
        n_rows: number of the caller's rows.
        index: reference of each row, -1 for none; None when there are no references.
        n_references: number of separate reference rows, or None when `index` points to rows.
        paired: each row has a counterpart in another lens.
        max_slots: at least 3.
    """
    offset = n_rows if n_references is not None else 0
    other = n_rows + (n_references or 0)
    shapes: dict[tuple[int, bool | None], list[list[int]]] = {}
    for target, members in _groups(n_rows, index):
        for segment in _split(members, target=target, offset=offset, room=max_slots, paired=paired):
            slots = list(segment.slots)
            if paired:
                slots[segment.n_out : segment.n_out] = [
                    other + row for row in slots[: segment.n_out]
                ]
            own = segment.own if target is not None else None
            shapes.setdefault((segment.n_out, own), []).append(slots)
    for (n_out, own), groups in shapes.items():
        per_tile = max(1, max_slots // len(groups[0]))
        for first in range(0, len(groups), per_tile):
            slots = torch.tensor(groups[first : first + per_tile], dtype=torch.long)
            reference = None if own is None else (n_out - 1 if own else slots.shape[1] - 1)
            yield Tile(slots=slots, n_out=n_out, paired=paired, reference=reference)


def _groups(
    n_rows: int, index: Int[Tensor, " row"] | None
) -> Iterator[tuple[int | None, list[int]]]:
    """Yield (reference, rows that point to it); rows without one come one by one."""
    if index is None:
        for row in range(n_rows):
            yield None, [row]
        return
    members: dict[int, list[int]] = {}
    for row, target in enumerate(index.tolist()):
        members.setdefault(target, []).append(row)
    for target, rows in members.items():
        if target >= 0:
            yield target, rows
        else:
            for row in rows:
                yield None, [row]


def _split(
    members: list[int], *, target: int | None, offset: int, room: int, paired: bool
) -> Iterator[_Segment]:
    """Cut one group into segments that fit `room` slots, each with its reference at the end."""
    if target is None:
        yield _Segment(slots=members, n_out=len(members), own=False)
        return
    own = offset == 0 and target in members
    rows = [row for row in members if row != target] if own else members
    size = max(1, (room - 1) // (2 if paired else 1) - (1 if own and paired else 0))
    chunks = [rows[first : first + size] for first in range(0, len(rows), size)] or [[]]
    for chunk in chunks[:-1]:
        yield _Segment(slots=[*chunk, offset + target], n_out=len(chunk), own=False)
    if own:
        yield _Segment(slots=[*chunks[-1], target], n_out=len(chunks[-1]) + 1, own=True)
    else:
        yield _Segment(slots=[*chunks[-1], offset + target], n_out=len(chunks[-1]), own=False)
