"""A head's scale, softcap and temperature on logits; and which temperature fits a head best.

Definitions after the layer-lens reference, 2.8 and 2.16. Everything here is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

GRID = (0.2, 5.0, 61)
FINE = 41


def cap(logits: Float[np.ndarray, " vocab"], softcap: float | None) -> Float[np.ndarray, " vocab"]:
    """Return softcap * tanh(logits / softcap); the logits themselves without a softcap."""
    return logits if not softcap else softcap * np.tanh(logits / softcap)


def kl_bits(logits: Float[np.ndarray, " vocab"], target: Float[np.ndarray, " vocab"]) -> float:
    """Return KL(softmax(logits) || softmax(target)) in bits, from differences of log-softmax."""
    p, q = _log_softmax(logits), _log_softmax(target)
    return max(0.0, float((np.exp(p) * (p - q)).sum() / np.log(2.0)))


def head_transforms(
    logits: Float[np.ndarray, " vocab"],
    head: Float[np.ndarray, " vocab"],
    *,
    scale: float | None,
    softcap: float | None,
) -> dict[str, Any]:
    """Return the last row's KL to the head, bits, before and after each transform of the head.

    `logits` are those of the last row without any transform, `head` the model's own. Scaling
    multiplies by `scale`; both transforms together scale first. What is absent is null.
    """
    after = {
        "scale": None if not scale else kl_bits(logits * scale, head),
        "softcap": None if not softcap else kl_bits(cap(logits, softcap), head),
        "scale_then_softcap": None
        if not (scale and softcap)
        else kl_bits(cap(logits * scale, softcap), head),
    }
    return {
        "status": "ok",
        "cfg_transform": {"scale": scale, "softcap": softcap},
        "kl_untransformed_bits": kl_bits(logits, head),
        "kl_after_transform_bits": after,
    }


def best_temperature(kl_at: Callable[[float], float]) -> tuple[float, float]:
    """Return the temperature with the smallest divergence, and that divergence.

    61 temperatures, evenly spaced in the logarithm from 0.2 to 5, and 1; then 41 linear ones within
    half of the best. Ties go to the temperature nearest 1.
    """
    low, high, count = GRID
    coarse = np.append(np.geomspace(low, high, count), 1.0)
    best, _ = _best(coarse, kl_at)
    return _best(np.append(np.linspace(0.5 * best, 1.5 * best, FINE), best), kl_at)


def head_mismatch(
    tuned: Float[np.ndarray, " vocab"], head: Float[np.ndarray, " vocab"]
) -> dict[str, float]:
    """Return the tuned lens's last-row KL to the head, bits, and after its best temperature."""
    tau, after = best_temperature(lambda t: kl_bits(tuned / t, head))
    return {
        "kl_bits_tuned_final": kl_bits(tuned, head),
        "kl_bits_tuned_final_after_tau_star": after,
        "tau_star_modelcal": tau,
    }


def _best(grid: Float[np.ndarray, " tau"], kl_at: Callable[[float], float]) -> tuple[float, float]:
    order = sorted(grid.tolist(), key=lambda t: abs(np.log(t)))
    values = [kl_at(t) for t in order]
    index = int(np.argmin(values))
    return order[index], values[index]


def _log_softmax(logits: Float[np.ndarray, " vocab"]) -> Float[np.ndarray, " vocab"]:
    z = logits.astype(np.float64)
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def transforms_match(section: Mapping[str, Any], *, exact_bits: float) -> bool | None:
    """Say whether the head's own transforms explain it: the KL after all of them is rounding.

    None when the head has no transform.
    """
    after = section["kl_after_transform_bits"]
    known = [value for value in after.values() if value is not None]
    last = after["scale_then_softcap"]
    if not known:
        return None
    return (last if last is not None else known[0]) <= exact_bits
