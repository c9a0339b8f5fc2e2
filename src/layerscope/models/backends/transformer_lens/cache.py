"""Keys and values of a `HookedTransformer`; a pass that continues them changes none.

TransformerLens stores keys before the rotary embedding and finds their positions in the mask. What
it appends to during a pass is a stand-in with the methods that its forward calls, so that no class
of one of its versions is needed. A bridge keeps the cache of transformers instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class Entry:
    """Keys and values of one block, as TransformerLens appends to them."""

    past_keys: Float[Tensor, "batch past kv_head d"]
    past_values: Float[Tensor, "batch past kv_head d"]

    def append(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens; return all of them."""
        self.past_keys = torch.cat([self.past_keys, new_keys], dim=1)
        self.past_values = torch.cat([self.past_values, new_values], dim=1)
        return self.past_keys, self.past_values


@dataclass
class Appending:
    """The cache of one pass, as TransformerLens fills it."""

    entries: list[Entry]
    mask: Int[Tensor, "batch past"]

    def __getitem__(self, layer: int) -> Entry:
        return self.entries[layer]

    def append_attention_mask(self, attention_mask: Tensor) -> Int[Tensor, "batch key"]:
        """Return the mask of past and new tokens."""
        return torch.cat([self.mask.to(attention_mask), attention_mask], dim=1)


@dataclass(frozen=True, eq=False)
class HookedCache:
    """The keys and values of every block; a row's tokens are its last columns.

    Attributes:
        mask: True where a column belongs to a real token.
        entries: (keys, values) of every block.
    """

    mask: Bool[Tensor, "batch past"]
    entries: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, filled: Appending, mask: Bool[Tensor, "batch past"]) -> HookedCache:
        """Wrap what a pass filled, without gaps: windows look back a number of columns."""
        cache = cls(mask, tuple((e.past_keys, e.past_values) for e in filled.entries))
        if not bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            return cache
        # A stable sort puts padding first and keeps the order of the tokens.
        order = torch.sort(mask.int(), dim=1, stable=True).indices
        order = order[:, -int(mask.sum(dim=1).max()) :]
        return cache._map(
            mask.gather(1, order),
            lambda x: x.take_along_dim(order.to(x.device)[:, :, None, None], dim=1),
        )

    def native(self) -> Appending:
        """Return a cache for one pass: appending to it makes new tensors and leaves these alone."""
        return Appending([Entry(*entry) for entry in self.entries], self.mask.long())

    def select(self, rows: Sequence[int]) -> HookedCache:
        """Return the cache of some rows, in this order; a row may be repeated."""
        index = torch.tensor(list(rows))
        return self._map(self.mask[index.to(self.mask.device)], lambda x: x[index.to(x.device)])

    def before(self, column: int) -> HookedCache:
        """Return the cache of the columns before one."""
        return self._map(self.mask[:, :column], lambda x: x[:, :column])

    def _map(self, mask: Tensor, change: Callable[[Tensor], Tensor]) -> HookedCache:
        return HookedCache(mask, tuple((change(k), change(v)) for k, v in self.entries))


def empty(
    n_layers: int, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Appending:
    """Return a cache without tokens; `shape` is (batch, kv_head, d)."""
    n_batch, n_heads, width = shape
    none = torch.empty(n_batch, 0, n_heads, width, device=device, dtype=dtype)
    mask = torch.empty(n_batch, 0, device=device, dtype=torch.long)
    return Appending([Entry(none, none) for _ in range(n_layers)], mask)
