"""Medians of facts with bootstrap intervals, and of differences between two runs on the same facts.

A milestone that is never reached is NaN: it is left out of the median and counted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from layerscope.measures.detectors import percentile

CHUNK = 1_000_000  # values that are sorted at once


@dataclass(frozen=True)
class Median:
    """Median depth of a milestone in one run, or why there is none to compare.

    `refused` is the reason for which the run is left out; its median is then that of all its own
    facts, without an interval. `n` facts were compared, `found` of them
    reach the milestone. `with_never` is the median with the others counted as never: None when it
    falls on one of these.
    """

    n: int = 0
    found: int = 0
    median: float | None = None
    low: float | None = None
    high: float | None = None
    with_never: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Difference:
    """Median over facts of a run's depth minus that of `base`, for facts that both reach.

    `row` is the larger share of the depth that one row is in either model: a smaller difference
    cannot be told from none. `resolved` needs that, and an interval that leaves out zero.
    """

    base: int
    n: int
    median: float | None
    low: float | None
    high: float | None
    row: float
    resolved: bool


def draws(name: str, n: int, *, seed: int, resamples: int) -> Int[np.ndarray, "resample fact"]:
    """Return indices of resampled facts; seed and name decide them, not the order of calls."""
    digest = hashlib.sha256(name.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    return rng.integers(0, max(n, 1), (resamples, n))


def median_of(
    values: Float[np.ndarray, " fact"], drawn: Int[np.ndarray, "resample fact"]
) -> Median:
    """Return the median of the known values, its interval, and that with the unknown as never."""
    known = values[~np.isnan(values)]
    if not known.size:
        return Median(n=len(values))
    medians = _resampled(values, drawn)
    never = np.sort(np.where(np.isnan(values), np.inf, values))
    middle = float((never[(len(never) - 1) // 2] + never[len(never) // 2]) / 2)
    return Median(
        n=len(values),
        found=int(known.size),
        median=percentile(known, 0.5),
        low=percentile(medians, 0.025),
        high=percentile(medians, 0.975),
        with_never=middle if np.isfinite(middle) else None,
    )


def _resampled(
    values: Float[np.ndarray, " fact"], drawn: Int[np.ndarray, "resample fact"]
) -> np.ndarray:
    """Return the median of every resample that holds a known value."""
    found: list[np.ndarray] = []
    for part in np.array_split(drawn, -(-drawn.size // CHUNK)):
        samples = np.sort(values[part], axis=1)  # unknown values come last
        known = samples.shape[1] - np.isnan(samples).sum(axis=1)
        samples, known = samples[known > 0], known[known > 0]
        at = np.arange(len(known))
        found.append((samples[at, (known - 1) // 2] + samples[at, known // 2]) / 2)
    return np.concatenate(found)


def difference_of(
    gaps: Float[np.ndarray, " fact"],
    drawn: Int[np.ndarray, "resample fact"],
    *,
    base: int,
    row: float,
) -> Difference:
    """Return the median of per-fact differences of depth from the run `base`."""
    entry = median_of(gaps, drawn)
    low, high, middle = entry.low, entry.high, entry.median
    resolved = False
    if low is not None and high is not None and middle is not None:
        resolved = not low <= 0.0 <= high and abs(middle) >= row - 1e-12
    return Difference(base, entry.found, middle, low, high, row, resolved)
