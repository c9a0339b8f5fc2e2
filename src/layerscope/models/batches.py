"""Batches of token ids: padding, masks, positions and character offsets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from layerscope.errors import ConfigError, PromptError
from layerscope.models.vocabulary import decode_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PaddingSide = Literal["left", "right"]
Span: TypeAlias = tuple[int, int]
RowOffsets: TypeAlias = tuple[Span | None, ...]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Token ids of several prompts, padded to one width.

    `offsets` holds, per row, the ``(start, end)`` characters of every real token in the prompt's
    text: None for a token that is not in the text (an added BOS), and None for a whole row whose
    text is unknown. `past_mask` marks the real tokens among the stored keys and values that the
    rows continue (see `continuing`); positions then count the whole sequence, and only those of
    this batch exist.
    """

    ids: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    lengths: tuple[int, ...]
    padding_side: PaddingSide = "right"
    offsets: tuple[RowOffsets | None, ...] = ()
    past_mask: Bool[Tensor, "batch past"] | None = None

    def __post_init__(self) -> None:
        check_side(self.padding_side)
        shape = tuple(self.ids.shape)
        if len(shape) != 2 or 0 in shape or self.attention_mask.shape != self.ids.shape:
            raise PromptError(
                f"a batch needs ids and attention_mask of one shape [batch, pos], got {list(shape)}"
                f" and {list(self.attention_mask.shape)}"
            )
        if self.ids.dtype != torch.long or self.attention_mask.dtype != torch.bool:
            raise PromptError(
                f"a batch needs int64 ids and a bool attention_mask, got {self.ids.dtype} and "
                f"{self.attention_mask.dtype}; TokenBatch.from_tensors converts them"
            )
        expected = _mask(self.lengths, shape[1], self.padding_side)
        if expected.shape != self.ids.shape or not torch.equal(expected, self.attention_mask.cpu()):
            raise PromptError(
                "attention_mask, lengths and padding_side disagree: each row must hold its real "
                f"tokens in one piece, padded on the {self.padding_side}"
            )
        if self.offsets and len(self.offsets) != len(self.lengths):
            raise PromptError("offsets need one entry per row (None where the text is unknown)")

    @classmethod
    def from_ids(
        cls,
        sequences: Sequence[Sequence[int]],
        pad_id: int = 0,
        padding_side: PaddingSide = "right",
        *,
        offsets: Sequence[RowOffsets | None] = (),
    ) -> TokenBatch:
        """Pad sequences of ids to the longest; `pad_id` may be any id, the mask hides it."""
        check_side(padding_side)
        if not sequences:
            raise PromptError("there is no prompt: give at least one")
        lengths = tuple(len(sequence) for sequence in sequences)
        if 0 in lengths:
            raise PromptError(f"prompt {lengths.index(0)} is empty: give it at least one token")
        width = max(lengths)
        ids = torch.full((len(lengths), width), pad_id, dtype=torch.long)
        mask = _mask(lengths, width, padding_side)
        ids[mask] = torch.tensor([int(id_) for sequence in sequences for id_ in sequence])
        return cls(ids, mask, lengths, padding_side, tuple(offsets))

    @classmethod
    def from_tensors(
        cls, ids: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"]
    ) -> TokenBatch:
        """Wrap ids and their attention mask (1 or True = real token); finds the padding side."""
        mask = attention_mask.bool()
        if mask.ndim != 2 or mask.numel() == 0:
            raise PromptError(f"attention_mask must be [batch, pos], got {list(mask.shape)}")
        lengths = tuple(int(length) for length in mask.sum(dim=1))
        if 0 in lengths:
            raise PromptError(f"prompt {lengths.index(0)} is empty: its attention mask is all zero")
        side: PaddingSide = "right" if bool(mask[:, 0].all()) else "left"
        return cls(ids.long(), mask, lengths, side)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Number of columns, padding included."""
        return self.ids.shape[1]

    @property
    def n_keys(self) -> int:
        """Number of key columns that a query may attend to: the past's and this batch's."""
        return self.width + (0 if self.past_mask is None else self.past_mask.shape[1])

    @property
    def key_mask(self) -> Bool[Tensor, "batch key"]:
        """True where a key column, of the past or of this batch, holds a real token."""
        if self.past_mask is None:
            return self.attention_mask
        return torch.cat([self.past_mask.to(self.attention_mask.device), self.attention_mask], 1)

    def with_ids(self, ids: Int[Tensor, "batch pos"]) -> TokenBatch:
        """Return the batch with other ids under the same padding; their texts are unknown."""
        if ids.shape != self.ids.shape or ids.dtype != torch.long:
            raise PromptError(
                f"these ids are {ids.dtype} {list(ids.shape)}; the batch holds int64 "
                f"{list(self.ids.shape)}"
            )
        other = copy.copy(self)  # not replace(): padding was checked when it was new
        object.__setattr__(other, "ids", ids)
        object.__setattr__(other, "offsets", ())
        return other

    def continuing(self, past_mask: Bool[Tensor, "batch past"]) -> TokenBatch:
        """Return the batch as the continuation of stored keys and values with this mask.

        Rows of different lengths are padded on the right then: some models count columns where
        they look back a number of tokens, so none may lie between a row and its past.

        Raises:
            PromptError: the past has another number of rows.
        """
        if past_mask.ndim != 2 or past_mask.shape[0] != len(self):
            raise PromptError(
                f"{len(self)} prompts cannot continue a cache of {past_mask.shape[0]} rows: give "
                "one prompt per row, or select the cache's rows"
            )
        continued = copy.copy(self)
        object.__setattr__(continued, "past_mask", past_mask)
        if self.padding_side == "left" and len(set(self.lengths)) > 1:
            # A stable sort puts the real tokens of each row first, in their order.
            order = torch.sort(self.attention_mask.int(), descending=True, stable=True).indices
            object.__setattr__(continued, "ids", self.ids.gather(1, order))
            object.__setattr__(continued, "attention_mask", self.attention_mask.gather(1, order))
            object.__setattr__(continued, "padding_side", "right")
        return continued

    def past_length(self, row: int) -> int:
        """Return the number of real tokens before this batch's in a row."""
        return 0 if self.past_mask is None else int(self.past_mask[self._row(row)].sum())

    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Return 0-based positions over the real tokens; padded columns get 0."""
        before = self.attention_mask.long().cumsum(dim=1) - 1
        if self.past_mask is not None:
            before = before + self.past_mask.to(before.device).sum(dim=1, keepdim=True)
        return before * self.attention_mask

    def column(self, row: int, position: int) -> int:
        """Return the padded column of a position of the unpadded row (negative: from its end)."""
        past = self.past_length(row)
        length = past + self.lengths[self._row(row)]
        wanted = position + length if position < 0 else position
        if not past <= wanted < length:
            first = f"{past} to {length - 1}, or {past - length} to -1" if past else ""
            raise PromptError(
                f"position {position} is outside prompt {row}, which has {length} tokens"
                + (f", {past} of them in the cache" if past else "")
                + f": use {first or f'{-length} to {length - 1}'}"
            )
        return self._start(row) + wanted - past

    def columns(
        self, rows: Sequence[int], positions: Sequence[Sequence[int]]
    ) -> Int[Tensor, "row pos"]:
        """Return `column` of several positions, equally many for every row given."""
        # All at once where nothing is wrong and nothing was before; one by one to say what is.
        if self.past_mask is None:
            wanted = torch.tensor(positions)
            length = torch.tensor([self.lengths[self._row(row)] for row in rows])[:, None]
            wanted = torch.where(wanted < 0, wanted + length, wanted)
            if bool(((wanted >= 0) & (wanted < length)).all()):
                return wanted + torch.tensor([self._start(row) for row in rows])[:, None]
        return torch.tensor(
            [
                [self.column(row, position) for position in chosen]
                for row, chosen in zip(rows, positions, strict=True)
            ]
        )

    def row_ids(self, row: int) -> tuple[int, ...]:
        """Return the ids of one row without padding."""
        length = self.lengths[self._row(row)]
        start = self._start(row)
        return tuple(int(id_) for id_ in self.ids[row, start : start + length].tolist())

    def tokens(self, row: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return the text of each token of one row without padding, leading spaces kept."""
        return decode_tokens(tokenizer, self.row_ids(row))

    def to(self, device: str | torch.device) -> TokenBatch:
        """Return the batch with its tensors on `device`."""
        moved = copy.copy(self)  # not replace(): the check of the mask would wait for the device
        object.__setattr__(moved, "ids", self.ids.to(device))
        object.__setattr__(moved, "attention_mask", self.attention_mask.to(device))
        if self.past_mask is not None:
            object.__setattr__(moved, "past_mask", self.past_mask.to(device))
        return moved

    def _row(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise PromptError(f"there is no prompt {row}: the batch has {len(self)}")
        return row

    def _start(self, row: int) -> int:
        return self.width - self.lengths[row] if self.padding_side == "left" else 0


def check_side(padding_side: str) -> None:
    """Raise ConfigError unless `padding_side` is ``left`` or ``right``."""
    if padding_side not in ("left", "right"):
        raise ConfigError(f"padding_side must be 'left' or 'right', got {padding_side!r}")


def _mask(lengths: Sequence[int], width: int, padding_side: PaddingSide) -> Tensor:
    columns = torch.arange(width)[None, :]
    real = torch.tensor(lengths)[:, None]
    return columns >= width - real if padding_side == "left" else columns < real
