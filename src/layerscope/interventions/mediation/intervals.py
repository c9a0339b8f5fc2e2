"""Bootstrap intervals over prompt pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


def bootstrap(
    over: Float[np.ndarray, " row"],
    under: Float[np.ndarray, " row"] | None = None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval:
    """Return a mean, or a ratio of means, with its percentile interval over resampled pairs.

    A ratio whose denominator is zero does not exist; draws in which it is are left out. One pair
    has no interval.
    """
    over = np.asarray(over, dtype=np.float64)
    below = None if under is None else np.asarray(under, dtype=np.float64)
    value = _ratio(over.mean(), None if below is None else below.mean(), below)
    if len(over) < 2 or value is None:
        return Interval(value)
    picks = np.random.default_rng(seed).integers(0, len(over), (draws, len(over)))
    means = over[picks].mean(1)
    if below is not None:
        found = [_ratio(a, b, below) for a, b in zip(means, below[picks].mean(1), strict=True)]
        means = np.array([ratio for ratio in found if ratio is not None])
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def _ratio(over: float, under: float | None, all_under: np.ndarray | None) -> float | None:
    if under is None or all_under is None:
        return float(over)
    size = float(np.abs(all_under).max())
    return float(over / under) if abs(under) > 1e-9 * max(size, 1e-300) else None
