"""The columns of a batch as the caller pads them, and as the model runs them.

mlx-lm's models take no attention mask: they are causal, so padding on the right is never looked at
by a real token. Every batch therefore runs padded on the right, whatever its own side; what goes
in and comes out is rolled row by row. A batch that continues a cache sees the cache's columns as
they are stored, padding hidden by a mask, and every row counts its own positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from layerscope.models.backends.mlx.arrays import to_mlx
from layerscope.models.batches import TokenBatch
from layerscope.models.edits import take


@dataclass(frozen=True, eq=False)
class Layout:
    """How the columns of one run are arranged.

    Attributes:
        width: columns of the batch.
        starts: [batch], the caller's column of each row's first token; None when all are 0.
        offsets: by row, how many tokens the cache holds.
        past: True where a column of the cache holds a token; None without a cache.
    """

    width: int
    starts: Int[Tensor, " batch"] | None
    offsets: tuple[int, ...]
    past: Bool[Tensor, "batch past"] | None

    @classmethod
    def of(cls, batch: TokenBatch) -> Layout:
        """Return the layout of a batch."""
        starts = None
        if batch.padding_side == "left" and min(batch.lengths) < batch.width:
            starts = torch.tensor([batch.width - length for length in batch.lengths])
        past = None if batch.past_mask is None else batch.past_mask.cpu()
        if past is not None and past.shape[1] == 0:
            past = None
        offsets = tuple(batch.past_length(row) for row in range(len(batch)))
        return cls(batch.width, starts, offsets, past)

    @property
    def n_past(self) -> int:
        """Number of columns of the cache."""
        return 0 if self.past is None else self.past.shape[1]

    def ids(self, batch: TokenBatch) -> mx.array:
        """Return the ids as the model runs them; padding becomes id 0, which every model has."""
        ids = batch.ids.cpu().masked_fill(~batch.attention_mask.cpu(), 0)
        return to_mlx(self.to_model(ids))

    def offset(self) -> int | mx.array:
        """Return the position of the first column: one number, or [batch] where rows differ."""
        return self.offsets[0] if len(set(self.offsets)) == 1 else mx.array(self.offsets)

    def to_caller(self, value: Tensor, axis: int = 1) -> Tensor:
        """Return a value of the model in the caller's columns."""
        return value if self.starts is None else self._roll(value, -self.starts, axis)

    def to_model(self, value: Tensor, axis: int = 1) -> Tensor:
        """Return a value in the caller's columns as the model has it."""
        return value if self.starts is None else self._roll(value, self.starts, axis)

    def weights_to_caller(self, value: Tensor) -> Tensor:
        """Return scores or patterns, [batch, head, query, key], in the caller's columns."""
        return self._weights(value, self.to_caller)

    def weights_to_model(self, value: Tensor) -> Tensor:
        """Undo `weights_to_caller`."""
        return self._weights(value, self.to_model)

    def hides(self, window: int | None) -> bool:
        """Return True when more is hidden from a query than what comes after it."""
        n_keys = self.n_past + self.width
        padded = self.past is not None and not bool(self.past.all())
        return padded or (window is not None and n_keys > window)

    def mask(self, window: int | None, *, array: bool = False) -> mx.array | str | None:
        """Return the mask an attention kernel needs, as mlx-lm gives it.

        Args:
            window: how many keys a query sees, itself included.
            array: give booleans, [query, key] or [batch, 1, query, key], where any are needed.
        """
        if not self.hides(window):
            if self.width == 1:
                return None
            if not array:
                return "causal"
        return to_mlx(self._visible(window))

    def _visible(self, window: int | None) -> Bool[Tensor, "*row query key"]:
        """Return True where a query may look; without a past, rows do not differ."""
        own = torch.arange(self.width)
        if self.past is None:
            return _sees(own[:, None], own[None], window)
        offsets = torch.tensor(self.offsets)[:, None]
        queries = offsets + own
        stored = self.past.long().cumsum(1) - 1
        keys = torch.cat([stored, queries], dim=1)
        visible = _sees(queries[:, :, None], keys[:, None], window)
        real = torch.cat([self.past, torch.ones_like(queries, dtype=torch.bool)], dim=1)
        return (visible & real[:, None])[:, None]

    def _weights(self, value: Tensor, convert: Callable[[Tensor, int], Tensor]) -> Tensor:
        if self.starts is None:
            return value
        past, own = value[..., : self.n_past], value[..., self.n_past :]
        return convert(torch.cat([past, convert(own, 3)], dim=-1), 2)

    def _roll(self, value: Tensor, by: Int[Tensor, " batch"], axis: int) -> Tensor:
        columns = (torch.arange(self.width) + by[:, None]) % self.width
        return take(value, torch.arange(len(by)), columns, axis)


def _sees(queries: Tensor, keys: Tensor, window: int | None) -> Bool[Tensor, "*row query key"]:
    visible = keys <= queries
    return visible if window is None else visible & (queries - keys < window)
