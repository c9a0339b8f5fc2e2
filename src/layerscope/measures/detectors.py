"""Detectors on arrays: where a condition first holds, where it stays, where it is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Milestone:
    """A condition along depth: its first row, its first row for good, and the rows that lost it.

    `first` is the smallest row where it holds. `stable` is the first row from which it holds up to
    and including the last row. `lost` lists the rows where it fails after having held on the row
    before. `fraction` is first / n_layers, 3 decimals. Nulls in the condition count as false.
    """

    first: int | None
    stable: int | None
    lost: tuple[int, ...]
    fraction: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the four fields, JSON-able."""
        return {
            "first": self.first,
            "stable": self.stable,
            "lost": list(self.lost),
            "fraction": self.fraction,
        }


def first_true(condition: Bool[np.ndarray, " row"], layers: Int[np.ndarray, " row"]) -> int | None:
    """Return the layer of the first true entry, None when there is none."""
    hits = np.flatnonzero(condition)
    return int(layers[hits[0]]) if hits.size else None


def milestone(
    condition: Bool[np.ndarray, " row"], layers: Int[np.ndarray, " row"], *, n_layers: int
) -> Milestone:
    """Describe where a condition holds along ascending layers."""
    first = first_true(condition, layers)
    if first is None:
        return Milestone(first=None, stable=None, lost=(), fraction=None)
    misses = np.flatnonzero(~condition)
    if not misses.size:
        stable: int | None = int(layers[0])
    elif misses[-1] + 1 < len(condition):
        stable = int(layers[misses[-1] + 1])
    else:
        stable = None
    falls = np.flatnonzero(condition[:-1] & ~condition[1:]) + 1
    return Milestone(
        first=first,
        stable=stable,
        lost=tuple(int(layers[index]) for index in falls),
        fraction=depth_fraction(first, n_layers),
    )


def depth_fraction(layer: int | None, n_layers: int) -> float | None:
    """Return layer / n_layers rounded to 3 decimals, None for a milestone that is missing."""
    return None if layer is None or n_layers < 1 else round(layer / n_layers, 3)


def run_of_two(condition: Bool[np.ndarray, " row"]) -> Bool[np.ndarray, " row_less_one"]:
    """Return where a condition holds on a row and on the next one; the last row has no next one."""
    return condition[:-1] & condition[1:]


def difference(after: int | None, before: int | None) -> int | None:
    """Return after - before, None when either is missing."""
    return None if after is None or before is None else after - before


def earliest(layers: Sequence[int | None]) -> int | None:
    """Return the smallest layer that is not missing."""
    known = [layer for layer in layers if layer is not None]
    return min(known) if known else None


def percentile(values: Float[np.ndarray, " value"], q: float) -> float | None:
    """Return the q-quantile, linear between the sorted values at rank q * (m - 1); NaN is left out.

    The interpolation is written as the weighted sum of its two neighbours, so that published
    figures come out to the last digit.
    """
    known = np.sort(values[~np.isnan(values)])
    if not known.size:
        return None
    rank = (known.size - 1) * q
    low, high = int(np.floor(rank)), int(np.ceil(rank))
    if low == high:
        return float(known[low])
    weight = rank - low
    return float(known[low] * (1.0 - weight) + known[high] * weight)


def median(values: Sequence[float | int | None]) -> float | None:
    """Return the median of the known values, None when there are none."""
    known = [float(value) for value in values if value is not None]
    return percentile(np.array(known), 0.5) if known else None


def percentile_row(n_layers: int, q: float) -> int:
    """Return the row at a depth fraction, n_layers * q, halves to the even (46 at 25% -> 12)."""
    return round(n_layers * q)


def quartiles(values: Float[np.ndarray, " value"]) -> dict[str, float | None]:
    """Return the percentiles p25, p50 and p75."""
    return {f"p{round(100 * q)}": percentile(values, q) for q in (0.25, 0.5, 0.75)}
