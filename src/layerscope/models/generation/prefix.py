"""Equal prompts read once: what no edit touches is the same in every row that has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerscope.models.backends.base import Cache
from layerscope.models.batches import TokenBatch
from layerscope.models.edits import Edit
from layerscope.models.scopes import Scope

if TYPE_CHECKING:
    from layerscope.models.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class Prefix:
    """The beginnings of prompts, read once for all rows that share them.

    Attributes:
        cache: keys and values of each row's beginning.
        rest: what each row has still to read, one token at least.
    """

    cache: Cache
    rest: TokenBatch


def untouched(prompts: TokenBatch, edits: Sequence[Edit]) -> list[int]:
    """Return how many first tokens of every prompt no edit acts on, the last token never counted.

    An edit counts for all rows, whatever rows it names.
    """
    lengths = list(prompts.lengths)
    kept = [length - 1 for length in lengths]
    for edit in edits:
        for row, length in enumerate(lengths):
            kept[row] = min(kept[row], _first(edit, length))
    return kept


def shared_prefix(
    model: LanguageModel, prompts: TokenBatch, edits: Sequence[Edit]
) -> Prefix | None:
    """Read the beginnings that rows share; None where that would save nothing."""
    rows = [prompts.row_ids(row) for row in range(len(prompts))]
    begins = [ids[:n] for ids, n in zip(rows, untouched(prompts, edits), strict=True)]
    distinct = list(dict.fromkeys(begins))
    if len(distinct) == len(rows) or () in distinct:
        return None
    batch = TokenBatch.from_ids(distinct, padding_side="left")
    found = model.run(batch, logits=None, keep_cache=True)
    if found.cache is None:
        return None
    place = {ids: index for index, ids in enumerate(distinct)}
    rest = [ids[len(begin) :] for ids, begin in zip(rows, begins, strict=True)]
    return Prefix(
        found.cache.select([place[begin] for begin in begins]),
        TokenBatch.from_ids(rest, padding_side="left"),
    )


def _first(edit: Edit, length: int) -> int:
    """Return the first position of a prompt that an edit may act on."""
    if edit.positions is not None:
        given: Any = edit.positions
        listed = torch.as_tensor(given).reshape(-1).tolist()
        return min((max(p + length if p < 0 else p, 0) for p in listed), default=length)
    if edit.scope is None:
        return 0
    active = Scope.parse(edit.scope).holds(torch.arange(length)[None], torch.tensor([length]))[0]
    return int(active.int().argmax()) if bool(active.any()) else length
