"""A head's softcap, proved from published probabilities alone.

A head that caps turns the logit z into c * tanh(z / c) after unembedding. Logarithms of
probabilities are logits up to one constant, so the probabilities of a few tokens with and without
the cap fix that constant, and then every further token is a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from layerscope.errors import TableError

_POINTS, _STEP = 801, 1e-10  # of the search for the one free logit


@dataclass(frozen=True)
class CapFit:
    """How a cap explains capped probabilities by uncapped ones.

    `top_logit` is the largest uncapped logit, the one free number; `max_error` the largest
    difference, in nats, between a capped gap and the published one; `tokens` counts the tokens.
    """

    top_logit: float
    max_error: float
    tokens: int


def cap(logits: Float[np.ndarray, " token"], softcap: float) -> Float[np.ndarray, " token"]:
    """Return softcap * tanh(logits / softcap)."""
    return softcap * np.tanh(logits / softcap)


def fit_softcap(uncapped: Sequence[float], capped: Sequence[float], *, softcap: float) -> CapFit:
    """Fit the one free logit by minimising the largest error; near 0 means that the cap is there.

    `uncapped` and `capped` are probabilities of the same tokens, the most likely one first. Raises
    TableError for fewer than three tokens, probabilities that are not positive, or a softcap that
    is not.
    """
    p, q = np.asarray(uncapped, dtype=float), np.asarray(capped, dtype=float)
    if p.shape != q.shape or p.size < 3 or min(p.min(), q.min()) <= 0.0:
        raise TableError("give the positive probabilities of the same three tokens or more")
    if not softcap > 0.0:
        raise TableError(f"the softcap is {softcap}; give a number above 0, e.g. 30")
    gaps, target = np.log(p / p[0]), np.log(q / q[0])

    def error(top: float) -> float:
        z = cap(top + gaps, softcap)
        return float(np.abs((z - z[0]) - target).max())

    low, high = -4.0 * softcap, 4.0 * softcap
    while True:
        grid = np.linspace(low, high, _POINTS)
        best = float(grid[int(np.argmin([error(top) for top in grid.tolist()]))])
        step = (high - low) / (_POINTS - 1)
        if step < _STEP * softcap:
            return CapFit(top_logit=best, max_error=error(best), tokens=int(p.size))
        low, high = best - 2.0 * step, best + 2.0 * step
