"""Sums over (feature, token) pairs when tokens change places within their prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from layerscope.errors import ConfigError

if TYPE_CHECKING:
    from layerscope.features.association import Activations

_TABLE = 1 << 26  # entries of a table of all pairs; beyond that pairs are searched for


class Shuffles:
    """Sums of every pair under shuffles of labels within clusters, drawn one after another."""

    def __init__(
        self,
        found: Activations,
        label: np.ndarray,
        excess: np.ndarray,
        pairs: np.ndarray,
        n_types: int,
        seed: int,
    ) -> None:
        self._label = label
        self._found = found
        self._excess = excess
        self._pairs = pairs
        self._n_types = n_types
        self._generator = np.random.default_rng(seed)

    def draw(self, count: int, rows: np.ndarray) -> Iterator[Float[np.ndarray, " row"]]:
        """Yield sums of the pairs `rows` under the next `count` shuffles."""
        found = self._found
        features, feature = np.unique(self._pairs[rows] // self._n_types, return_inverse=True)
        kinds, kind = np.unique(self._pairs[rows] % self._n_types, return_inverse=True)
        # Kinds and features that are not wanted get the last number, whose sums are thrown away.
        kind_of = np.full(self._n_types, len(kinds), dtype=np.int32)
        kind_of[kinds] = np.arange(len(kinds))
        feature_of = np.full(found.n_features, len(features), dtype=np.int64)
        feature_of[features] = np.arange(len(features))
        labels = kind_of[self._label]
        used = self._reachable(labels, feature, kind, feature_of, (len(features), len(kinds)))
        tokens = np.zeros(found.clusters[-1] + 1, dtype=bool)
        tokens[found.clusters[found.place[used]]] = True
        kept = tokens[found.clusters]
        deal = _Deal(labels[kept], found.clusters[kept])
        place = (np.cumsum(kept) - 1)[found.place[used]]
        own, excess = feature_of[found.feature[used]], self._excess[used]
        sum_of = _Lookup(feature, kind, (len(features), len(kinds)))
        for _ in range(count):
            # Numbers for all tokens, so that they do not depend on which pairs are left.
            drawn = self._generator.integers(0, 1 << 32, len(kept), dtype=np.uint32)[kept]
            at = sum_of(own, deal(drawn)[place])
            yield np.bincount(at, excess, minlength=len(rows) + 1)[:-1]

    def _reachable(
        self,
        labels: Int[np.ndarray, " token"],
        feature: np.ndarray,
        kind: np.ndarray,
        feature_of: np.ndarray,
        shape: tuple[int, int],
    ) -> np.ndarray:
        """Return the entries that a shuffle can bring to a wanted pair.

        Those of a feature in a cluster that has a token of one of the feature's kinds.
        """
        found = self._found
        entry = feature_of[found.feature]
        wanted = np.flatnonzero(entry < shape[0])
        n_clusters = int(found.clusters[-1]) + 1
        if not len(wanted) or shape[0] * n_clusters > _TABLE * 4:
            return wanted
        ones = np.ones(len(feature), dtype=bool)
        pairs = csr_array((ones, (feature, kind)), shape=shape)
        here = np.flatnonzero(labels < shape[1])
        places = np.unique(labels[here] * np.int64(n_clusters) + found.clusters[here])
        where = (places // n_clusters, places % n_clusters)
        present = csr_array((np.ones(len(places), dtype=bool), where), shape=(shape[1], n_clusters))
        product: Any = pairs @ present
        reached = product.toarray()
        return wanted[reached[entry[wanted], found.clusters[found.place[wanted]]]]


class _Deal:
    """Deals the labels of every cluster out anew, as random numbers say.

    Cluster, number and label share one integer, so that a plain sort does it: several times as fast
    as finding the order first. Of the number as many bits count as are left.
    """

    def __init__(self, labels: Int[np.ndarray, " token"], clusters: np.ndarray) -> None:
        self._low = max(int(labels.max(initial=0)).bit_length(), 1)
        self._high = max(int(clusters.max(initial=0)).bit_length(), 1)
        self._bits = min(32, 64 - self._low - self._high)
        if self._bits < 16:
            raise ConfigError(
                f"{1 << self._high:,} texts of {1 << self._low:,} kinds of tokens are too many to "
                "shuffle at once: give fewer texts"
            )
        self._fixed = clusters.astype(np.uint64) << np.uint64(64 - self._high)
        self._fixed |= labels.astype(np.uint64)

    def __call__(self, drawn: Int[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
        numbers = drawn.astype(np.uint64) >> np.uint64(32 - self._bits)
        keys = self._fixed | (numbers << np.uint64(self._low))
        keys.sort()
        return (keys & np.uint64((1 << self._low) - 1)).astype(np.int64)


class _Lookup:
    """The row of a pair of feature and kind; pairs that are not wanted get the number of rows."""

    def __init__(self, feature: np.ndarray, kind: np.ndarray, shape: tuple[int, int]) -> None:
        self._rows = len(feature)
        self._width = shape[1] + 1
        self._table: np.ndarray | None = None
        key = feature.astype(np.int64) * self._width + kind
        if shape[0] * self._width <= _TABLE:
            self._table = np.full(shape[0] * self._width, self._rows, dtype=np.int32)
            self._table[key] = np.arange(self._rows)
        self._keys = key  # ascending, as the pairs are

    def __call__(self, feature: np.ndarray, kind: np.ndarray) -> np.ndarray:
        key = feature * self._width + kind
        if self._table is not None:
            return self._table[key]
        at = np.searchsorted(self._keys, key)
        at[at == self._rows] = 0
        return np.where(self._keys[at] == key, at, self._rows)
