"""Keys and values of a pass as transformers keeps them; a pass that continues them changes none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True, eq=False)
class KeyValueCache:
    """The keys and values of every block, all columns of them, whatever window a block looks at.

    Attributes:
        mask: True where a column belongs to a real token.
    """

    mask: Bool[Tensor, "batch past"]
    _native: DynamicCache

    @staticmethod
    def empty() -> DynamicCache:
        """Return a cache that keeps all columns: windows are a matter of the mask alone."""
        return DynamicCache()

    @classmethod
    def of(cls, native: DynamicCache, mask: Bool[Tensor, "batch past"]) -> KeyValueCache:
        """Wrap what a pass filled."""
        return cls(mask, native)

    def native(self) -> DynamicCache:
        """Return a cache for one pass: appending to it makes new tensors and leaves these alone."""
        given = copy.copy(self._native)
        given.layers = [copy.copy(layer) for layer in self._native.layers]
        return given

    def select(self, rows: Sequence[int]) -> KeyValueCache:
        """Return the cache of some rows, in this order; a row may be repeated."""
        index = torch.tensor(list(rows))
        return self._map(self.mask[index.to(self.mask.device)], lambda x: x[index.to(x.device)])

    def before(self, column: int) -> KeyValueCache:
        """Return the cache of the columns before one."""
        return self._map(self.mask[:, :column], lambda x: x[:, :, :column])

    def _map(self, mask: Tensor, change: Callable[[Tensor], Tensor]) -> KeyValueCache:
        native = self.native()
        for layer in native.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = change(layer.keys), change(layer.values)
        return KeyValueCache(mask, native)


def supports_cache(model: PreTrainedModel) -> bool:
    """Return True when the model keeps nothing of the past but keys and values."""
    if getattr(model, "_is_stateful", False):
        return False
    return bool(getattr(model, "_supports_cache_class", True))
