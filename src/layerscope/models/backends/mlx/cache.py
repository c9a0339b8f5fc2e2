"""Keys and values of a pass as MLX arrays; a pass that continues them changes none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import torch
from jaxtyping import Bool
from torch import Tensor

from layerscope.models.backends.mlx.arrays import to_mlx
from layerscope.models.backends.mlx.layout import Layout

KeysAndValues = tuple[mx.array, mx.array]
Visit = Callable[[mx.array, mx.array], KeysAndValues]


@dataclass(frozen=True, eq=False)
class KeyValueCache:
    """The keys and values of every block, all columns of them, whatever window a block looks at.

    Attributes:
        mask: True where a column belongs to a real token.
        layers: by block, keys and values [batch, kv_head, column, d], evaluated, so that any
            thread may go on with them.
    """

    mask: Bool[Tensor, "batch past"]
    layers: tuple[KeysAndValues, ...]

    @classmethod
    def of(cls, mask: Bool[Tensor, "batch past"], layers: Sequence[KeysAndValues]) -> KeyValueCache:
        """Wrap keys and values, and compute them."""
        mx.eval(list(layers))
        return cls(mask, tuple(layers))

    def select(self, rows: Sequence[int]) -> KeyValueCache:
        """Return the cache of some rows, in this order; a row may be repeated."""
        index = torch.tensor(list(rows)).cpu() % len(self.mask)
        chosen = to_mlx(index)
        return self._map(self.mask[index], lambda x: mx.take(x, chosen, axis=0))

    def before(self, column: int) -> KeyValueCache:
        """Return the cache of the columns before one."""
        return self._map(self.mask[:, :column], lambda x: x[:, :, :column])

    def _map(self, mask: Tensor, change: Callable[[mx.array], mx.array]) -> KeyValueCache:
        return KeyValueCache.of(
            mask, [(change(keys), change(values)) for keys, values in self.layers]
        )


class LayerCache:
    """What one block of mlx-lm takes for its cache in one pass.

    It says where the pass begins and what it may look at, shows the run the new keys and values
    before they are stored, and never writes to the old ones.
    """

    def __init__(self, layout: Layout, past: KeysAndValues | None, visit: Visit) -> None:
        self._layout = layout
        self._past = past
        self._visit = visit
        self.offset = layout.offset()
        self.fetched: KeysAndValues | None = None
        """All keys and values, once the block's attention has asked for them."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysAndValues:
        """Return the keys and values of the past and of this pass."""
        keys, values = self._visit(keys, values)
        if self._past is not None:
            keys = mx.concatenate([self._past[0], keys], axis=2)
            values = mx.concatenate([self._past[1], values], axis=2)
        self.fetched = (keys, values)
        return keys, values

    def make_mask(
        self, _n: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> mx.array | str | None:
        """Return the mask of a block with this window."""
        return self._layout.mask(window_size, array=return_array)

    def stored(self) -> KeysAndValues:
        """Return all keys and values, in the caller's columns."""
        assert self.fetched is not None
        if self._layout.starts is None:
            return self.fetched
        width, n_past = self._layout.width, self._layout.n_past
        own = torch.arange(width) - self._layout.starts[:, None]
        past = torch.arange(n_past).expand(len(own), -1)
        columns = to_mlx(torch.cat([past, n_past + own % width], dim=1))[:, None, :, None]
        keys, values = self.fetched
        return mx.take_along_axis(keys, columns, axis=2), mx.take_along_axis(
            values, columns, axis=2
        )
