"""Effect sizes from sums, paired tests of decisions, and the power that trials give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma, sqrt

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy import stats

_Z = 1.959963984540054
_NOISE = 1e-28  # of the squared mean: what rounding leaves of a variance that is zero


@dataclass
class Sums:
    """Counts, sums and sums of squares of every feature, which add up chunk by chunk.

    Sums are those of differences from `pivot`, the first chunk's means, so that a large mean does
    not eat a small variance.
    """

    count: int
    pivot: Float[np.ndarray, " feature"]
    total: Float[np.ndarray, " feature"]
    squares: Float[np.ndarray, " feature"]
    active: Float[np.ndarray, " feature"]

    @classmethod
    def empty(cls, n_features: int) -> Sums:
        """Return the sums of no values."""
        return cls(0, *(np.zeros(n_features) for _ in range(4)))

    def add(self, values: Float[np.ndarray, "prompt feature"]) -> None:
        """Add values, one row per prompt."""
        if not self.count:
            self.pivot = values.mean(axis=0, dtype=np.float64)
        apart = values.astype(np.float64) - self.pivot
        self.count += len(apart)
        self.total += apart.sum(axis=0)
        self.squares += np.square(apart).sum(axis=0)
        self.active += (values > 0).sum(axis=0)

    @property
    def mean(self) -> Float[np.ndarray, " feature"]:
        """Mean of every feature."""
        return self.pivot + self.total / self.count

    @property
    def variance(self) -> Float[np.ndarray, " feature"]:
        """Variance with one degree of freedom taken off; 0 where only rounding is left."""
        spread = np.maximum(self.squares - self.total**2 / self.count, 0.0)
        spread[spread <= _NOISE * self.count * self.pivot**2] = 0.0
        return spread / (self.count - 1)


def contrast(safe: Sums, risky: Sums) -> pl.DataFrame:
    """Return one row per feature: means, Welch's test, Cohen's d (risky - safe) and Hedges's g.

    d divides by the pooled standard deviation (one degree of freedom off per group); g takes off
    its small-sample bias exactly (Hedges 1981). The interval of d is the large-sample one. A
    feature that is active nowhere, or varies in neither group, has no test: nulls.
    """
    a, b = safe, risky
    va, vb = a.variance, b.variance
    free = a.count + b.count - 2
    pooled = np.sqrt(((a.count - 1) * va + (b.count - 1) * vb) / free)
    difference = b.mean - a.mean
    with np.errstate(divide="ignore", invalid="ignore"):
        d = difference / pooled
        ea, eb = va / a.count, vb / b.count
        t = difference / np.sqrt(ea + eb)
        df = (ea + eb) ** 2 / (ea**2 / (a.count - 1) + eb**2 / (b.count - 1))
        p = 2.0 * stats.t.sf(np.abs(t), df)
        n = a.count + b.count
        error = np.sqrt(n / (a.count * b.count) + d**2 / (2 * n))
        low, high = d - _Z * error, d + _Z * error
    columns: dict[str, Float[np.ndarray, " feature"]] = {
        "safe_mean": a.mean,
        "risky_mean": b.mean,
        "safe_std": np.sqrt(va),
        "risky_std": np.sqrt(vb),
        "safe_active": a.active / a.count,
        "risky_active": b.active / b.count,
        "cohen_d": d,
        "d_low": low,
        "d_high": high,
        "hedges_g": d * hedges_factor(free),
        "t": t,
        "df": df,
        "p": p,
    }
    frame = pl.DataFrame(columns, nan_to_null=True).with_columns(
        pl.when(pl.col(name).is_infinite()).then(None).otherwise(pl.col(name)).alias(name)
        for name in ("cohen_d", "d_low", "d_high", "hedges_g", "t", "df", "p")
    )
    # Where nothing varies a difference is either none or not to be measured.
    untested = pl.Series((va == 0) & (vb == 0))
    tests = ("cohen_d", "d_low", "d_high", "hedges_g", "t", "df", "p")
    return frame.with_columns(
        *(pl.when(untested).then(None).otherwise(pl.col(name)).alias(name) for name in tests),
        dead=pl.Series(a.active + b.active == 0),
    )


def hedges_factor(free: int) -> float:
    """Return what takes the small-sample bias off d, given the degrees of freedom."""
    return exp(lgamma(free / 2) - lgamma((free - 1) / 2)) / sqrt(free / 2)


def q_values(p: pl.Series) -> pl.Series:
    """Return Benjamini and Hochberg's q; null stays null and is not counted."""
    values = p.to_numpy().astype(np.float64)
    known = ~np.isnan(values)
    q = np.full(len(values), np.nan)
    if known.any():
        q[known] = stats.false_discovery_control(values[known])
    return pl.Series("q", q, nan_to_null=True)


@dataclass(frozen=True)
class Paired:
    """A change between two conditions whose trials share prompt and draws.

    Attributes:
        n: pairs of which both are valid.
        before, after: rates; None without a pair.
        gained, lost: pairs that differ, by direction.
        p: exact two-sided probability (McNemar); None without a pair.
        low, high: 95% interval of the change (Wald with Agresti and Min's added pairs).
    """

    n: int
    before: float | None
    after: float | None
    gained: int
    lost: int
    p: float | None
    low: float | None
    high: float | None

    @property
    def effect(self) -> float | None:
        """Change of the rate."""
        return None if self.n == 0 else (self.gained - self.lost) / self.n


def paired(before: Sequence[bool | None], after: Sequence[bool | None]) -> Paired:
    """Compare two conditions trial by trial; a pair with an invalid answer is left out."""
    both = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    n = len(both)
    if not n:
        return Paired(0, None, None, 0, 0, None, None, None)
    gained = sum(b and not a for a, b in both)
    lost = sum(a and not b for a, b in both)
    differing = gained + lost
    p = min(1.0, 2.0 * float(stats.binom.cdf(min(gained, lost), differing, 0.5)))
    up, down, size = gained + 0.5, lost + 0.5, n + 2
    middle = (up - down) / size
    half = _Z * sqrt(max(up + down - (up - down) ** 2 / size, 0.0)) / size
    return Paired(
        n,
        sum(a for a, _ in both) / n,
        sum(b for _, b in both) / n,
        gained,
        lost,
        p,
        max(-1.0, middle - half),
        min(1.0, middle + half),
    )


def paired_power(n: int, gain: float, loss: float = 0.0, *, alpha: float = 0.05) -> float:
    """Return the probability that the exact paired test of n trials finds a change.

    `gain` and `loss` are the probabilities that a trial changes one way or the other.
    """
    total = 0.0
    counts = np.arange(n + 1)
    differing = stats.binom.pmf(counts, n, gain + loss)
    for m, weight in zip(counts.tolist(), differing.tolist(), strict=True):
        if m == 0 or weight == 0.0:
            continue
        ups = np.arange(m + 1)
        p = np.minimum(1.0, 2.0 * stats.binom.cdf(np.minimum(ups, m - ups), m, 0.5))
        total += weight * float(stats.binom.pmf(ups, m, gain / (gain + loss))[p <= alpha].sum())
    return total


def detectable(n: int, *, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """Return the smallest one-way change that n pairs find with this power; None if there is none.

    To a thousandth.
    """
    for step in range(1, 1001):
        if paired_power(n, step / 1000, alpha=alpha) >= power:
            return step / 1000
    return None
