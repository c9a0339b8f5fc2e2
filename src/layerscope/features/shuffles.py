"""Sums over (feature, token) pairs when tokens change places within their prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

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
        labels, clusters = labels[kept], found.clusters[kept].astype(np.float64)
        place = (np.cumsum(kept) - 1)[found.place[used]]
        own, excess = feature_of[found.feature[used]], self._excess[used]
        sum_of = _Lookup(feature, kind, (len(features), len(kinds)))
        for _ in range(count):
            # Numbers for all tokens, so that they do not depend on which pairs are left.
            drawn = self._generator.random(len(kept))[kept]
            order = np.argsort(clusters + drawn)
            at = sum_of(own, labels[order][place])
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
        reached: Any = (pairs @ present).toarray()
        return wanted[reached[entry[wanted], found.clusters[found.place[wanted]]]]


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
