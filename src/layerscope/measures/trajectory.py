"""How the residual's length grows with depth, and rows where it jumps."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from layerscope.measures.config import MeasureConfig
from layerscope.measures.rows import PassRows

LENGTH_EPSILON = 1e-9
MAD_TO_SIGMA = 0.6745  # median absolute deviation of a normal distribution, in standard deviations


def growth_spikes(
    lengths: Float[np.ndarray, " row"], layers: Int[np.ndarray, " row"], config: MeasureConfig
) -> list[int]:
    """Return the layers whose residual length jumps against the row before, by a robust z-score.

    A jump is a growth that differs from the stack's median growth by more than `growth_factor`
    (either way) and, in its logarithm, by more than `growth_z` robust standard deviations (MAD).
    """
    known = ~np.isnan(lengths)
    lengths, layers = lengths[known], layers[known]
    if lengths.size < 4:
        return []
    growth = np.diff(np.log(lengths + LENGTH_EPSILON))
    off = np.abs(growth - np.median(growth))
    far = MAD_TO_SIGMA * off > config.growth_z * np.median(off)
    jumps = far & (off > np.log(config.growth_factor))
    return [int(layer) for layer in layers[1:][jumps]]


def norm_trajectory(
    part: PassRows, config: MeasureConfig, *, semantic: int | None
) -> dict[str, Any]:
    """Return slope and fit of ln |residual| against depth, and both kinds of spike.

    `n_spikes` and `shape` follow the published rule: up to L_semantic (everywhere when it is
    missing) a row is a spike when normalisation multiplies its length by more than 3 or turns it to
    a cosine below 0.8. Early rows of every RMS-normalised model are such spikes; `growth_spikes`
    and `growth_shape` use the growth of the residual itself and are what guidance relies on.
    """
    ratio, cosine = part.floats("resid_norm_ratio"), part.floats("delta_resid_cos")
    scope = np.ones(len(part.layers), dtype=bool) if semantic is None else part.layers <= semantic
    spikes = int((scope & ((ratio > config.spike_ratio) | (cosine < config.spike_cos))).sum())
    lengths = part.floats("resid_norm")
    slope, r2 = _fit(lengths, part.layers)
    jumps = growth_spikes(lengths, part.layers, config)
    return {
        "shape": _shape(spikes, slope, r2, config),
        "slope": slope,
        "r2": r2,
        "n_spikes": spikes,
        "sampled_layers": len(part.layers),
        "growth_spikes": jumps,
        "growth_shape": _shape(len(jumps), slope, r2, config),
    }


def _fit(
    lengths: Float[np.ndarray, " row"], layers: Int[np.ndarray, " row"]
) -> tuple[float | None, float | None]:
    """Return slope and r2 of the least-squares line through ln(length) against the layer."""
    known = ~np.isnan(lengths)
    if known.sum() < 2:
        return None, None
    x, y = layers[known].astype(float), np.log(lengths[known] + LENGTH_EPSILON)
    centred_x, centred_y = x - x.mean(), y - y.mean()
    spread_x, spread_y = float(centred_x @ centred_x), float(centred_y @ centred_y)
    if spread_x == 0.0:
        return None, None
    slope = float(centred_x @ centred_y) / spread_x
    residual = centred_y - slope * centred_x
    return slope, 1.0 - float(residual @ residual) / spread_y if spread_y > 0.0 else 1.0


def _shape(spikes: int, slope: float | None, r2: float | None, config: MeasureConfig) -> str | None:
    if spikes:
        return "spike"
    if slope is None or r2 is None:
        return None
    if abs(slope) <= config.plateau_slope:
        return "plateau"
    return "monotonic" if r2 >= config.monotonic_r2 else "non_monotonic"
