"""Keys and values of a pass as transformers keeps them; a pass that continues them changes none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from layerscope.errors import CapabilityError

Exchanged = Sequence[tuple[Tensor, Tensor]]
"""Keys or values as the model computed them, and what an edit made of them."""


@dataclass(frozen=True, eq=False)
class KeyValueCache:
    """The keys and values of every block, all columns of them, whatever window a block looks at.

    A row's tokens are its last columns, whatever the padding of the pass: models with a window look
    back a number of columns, so there must be no gap between tokens, nor before the next one.

    Rows that were selected are gathered when something needs them: a pass does so block by block.

    Attributes:
        mask: True where a column belongs to a real token.
    """

    mask: Bool[Tensor, "batch past"]
    _native: DynamicCache
    _rows: Int[Tensor, " batch"] | None = None

    @staticmethod
    def empty() -> DynamicCache:
        """Return a cache that keeps all columns: windows are a matter of the mask alone."""
        return DynamicCache()

    @classmethod
    def of(
        cls,
        native: DynamicCache,
        mask: Bool[Tensor, "batch past"],
        exchanged: Exchanged = (),
        *,
        gaps: bool = True,
    ) -> KeyValueCache:
        """Wrap what a pass filled, with edited keys and values in place of the model's own.

        `gaps` says that there may be padding after a row's first token.

        Raises:
            CapabilityError: the model keeps other keys than those its attention kernel reads.
        """
        for original, edited in exchanged:
            _exchange(native, original, edited)
        cache = cls(mask, native)
        if gaps and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            return cache._without_gaps()
        return cache

    def native(self, *, keep: bool = True) -> DynamicCache:
        """Return a cache for one pass: appending to it makes new tensors and leaves these alone.

        Without `keep` it forgets what is appended once the block that did so has read it.
        """
        given = copy.copy(self._native)
        rows = self._rows
        if keep:
            given.layers = [copy.copy(layer) for layer in self._native.layers]
            for layer in _layers(given):
                if rows is not None and layer.keys is not None and layer.values is not None:
                    layer.keys, layer.values = (
                        _of_rows(layer.keys, rows),
                        _of_rows(layer.values, rows),
                    )
        else:
            passing: list[Any] = [
                copy.copy(layer) if layer.keys is None else _Passing(layer, rows)
                for layer in _layers(self._native)
            ]
            given.layers = passing
        return given

    def select(self, rows: Sequence[int]) -> KeyValueCache:
        """Return the cache of some rows, in this order; a row may be repeated."""
        index = torch.tensor(list(rows))
        chosen = index if self._rows is None else self._rows[index]
        return KeyValueCache(self.mask[index.to(self.mask.device)], self._native, chosen)

    def before(self, column: int) -> KeyValueCache:
        """Return the cache of the columns before one."""
        return self._map(self.mask[:, :column], lambda x: x[:, :, :column])

    def stored(self, block: int) -> tuple[Tensor, Tensor, Int[Tensor, " row"] | None]:
        """Return keys and values of one block as they are stored, and which stored row each is.

        None stands for the same order.
        """
        layer = _layers(self._native)[block]
        return layer.keys, layer.values, self._rows

    def past(self, block: int, rows: Sequence[int], column: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one block before a column, [row, kv_head, key, d]."""
        layer = _layers(self._native)[block]
        keys, values = layer.keys[:, :, :column], layer.values[:, :, :column]
        chosen = list(rows) if self._rows is None else self._rows[list(rows)].tolist()
        if len(set(chosen)) == 1:  # one row is not copied for each that reads it
            only, shape = slice(chosen[0], chosen[0] + 1), (len(chosen), -1, -1, -1)
            return keys[only].expand(shape), values[only].expand(shape)
        return keys[chosen], values[chosen]

    def _without_gaps(self) -> KeyValueCache:
        """Return the cache with every row's tokens moved to its last columns."""
        # A stable sort puts padding first and keeps the order of the tokens.
        order = torch.sort(self.mask.int(), dim=1, stable=True).indices
        order = order[:, -int(self.mask.sum(dim=1).max()) :]
        return self._map(
            self.mask.gather(1, order),
            lambda x: x.take_along_dim(order.to(x.device)[:, None, :, None], dim=2),
        )

    def _map(self, mask: Tensor, change: Callable[[Tensor], Tensor]) -> KeyValueCache:
        native = copy.copy(self._native)
        native.layers = [copy.copy(layer) for layer in self._native.layers]
        for layer in _layers(native):
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = change(layer.keys), change(layer.values)
        return KeyValueCache(mask, native, self._rows)


class _Passing(DynamicLayer):
    """The past of one block, of chosen rows; what is appended is not kept."""

    def __init__(self, layer: Any, rows: Int[Tensor, " batch"] | None) -> None:
        super().__init__()
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.is_initialized = True
        self._rows = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        if self._rows is not None:
            keys, values = _of_rows(keys, self._rows), _of_rows(values, self._rows)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def _of_rows(stored: Tensor, rows: Int[Tensor, " batch"]) -> Tensor:
    """Return the chosen rows; one row is not copied for each that reads it."""
    if stored.shape[0] == 1:
        return stored.expand(len(rows), -1, -1, -1)
    return stored[rows.to(stored.device)]


def supports_cache(model: PreTrainedModel) -> bool:
    """Return True when the model says it keeps nothing of the past but keys and values."""
    return not getattr(model, "_is_stateful", False)


def continuation_error(base: Callable[..., Any], device: torch.device, *, positions: bool) -> float:
    """Return by how much a pass in three pieces differs from one in one piece; relative.

    Two rows of unlike length, so that padding and positions count too. Whatever the model raises
    when it is given a cache comes through.
    """
    ids = torch.arange(3, 21, device=device).view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    places = ((mask.cumsum(dim=1) - 1) * mask) if positions else None

    def hidden(first: int, last: int, **options: Any) -> Tensor:
        if places is not None:
            options["position_ids"] = places[:, first:last]
        output = base(
            input_ids=ids[:, first:last], attention_mask=mask[:, :last], return_dict=True, **options
        )
        return output.last_hidden_state.float()

    with torch.no_grad():
        whole = hidden(0, 9, use_cache=False)
        cache = KeyValueCache.empty()
        cuts = ((0, 6), (6, 7), (7, 9))
        pieces = [hidden(*cut, past_key_values=cache, use_cache=True) for cut in cuts]
    difference = (torch.cat(pieces, dim=1) - whole)[mask.bool()].abs().max()
    return float(difference / whole[mask.bool()].abs().max())


def _layers(native: DynamicCache) -> list[Any]:
    """Return the layers, whose class declares more kinds than a cache without a config makes."""
    return list(native.layers)


def _exchange(native: DynamicCache, original: Tensor, edited: Tensor) -> None:
    for layer in _layers(native):
        if layer.keys is original:
            layer.keys = edited
            return
        if layer.values is original:
            layer.values = edited
            return
    raise CapabilityError(
        "edited keys and values of this model cannot be kept: what it stores is not what its "
        "attention kernel reads; edit attn_in or the residual stream, or run without a cache"
    )
