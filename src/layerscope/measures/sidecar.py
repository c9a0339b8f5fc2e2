"""Another lens beside the norm lens: milestones, divergences and what explains the gain.

Definitions after the layer-lens reference, 2.16. Deltas of divergences are baseline - other
(positive: the other lens is nearer the model); deltas of rows are other - baseline (negative: it is
earlier).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerscope.measures.config import MeasureConfig
from layerscope.measures.detectors import difference, first_true, percentile_row
from layerscope.measures.distribution import DEPTHS
from layerscope.measures.rows import PassRows

RANKS = (10, 5, 1)
KL_BITS = 1.0


def sidecar_metrics(baseline: PassRows, other: PassRows) -> dict[str, Any]:
    """Return rank milestones, KL by depth and the first row within 1 bit, of both and their delta.

    The keys of each pair are "baseline", the other lens's name, and "delta".
    """
    ranks = {part.lens: _ranks(part) for part in (baseline, other)}
    bits = {part.lens: _bits(part) for part in (baseline, other)}
    near = {
        part.lens: first_true(part.floats("kl_to_final_bits") <= KL_BITS, part.layers)
        for part in (baseline, other)
    }
    one, two = baseline.lens, other.lens
    return {
        "rank_milestones": {
            "baseline": ranks[one],
            two: ranks[two],
            "delta": {name: difference(ranks[two][name], ranks[one][name]) for name in ranks[one]},
        },
        "kl_bits_at_percentiles": {
            "baseline": bits[one],
            two: bits[two],
            "delta": {name: _less(bits[one][name], bits[two][name]) for name in DEPTHS},
        },
        "first_kl_le_1.0": {
            "baseline": near[one],
            two: near[two],
            "delta": difference(near[two], near[one]),
        },
    }


def attribution(
    baseline: PassRows, tuned: PassRows, config: MeasureConfig | None = None
) -> dict[str, Any]:
    """Split the tuned lens's gain at 25, 50 and 75% of the depth into temperature and rotation.

    ΔKL_tuned = KL_norm - KL_tuned; ΔKL_temp = KL_norm - KL of the norm lens under one temperature
    per row; ΔKL_rot = their difference; null where one is unknown. `prefer_tuned`: rotation gains
    0.2 bits or more at 50%, or the answer is among the first five earlier, by 2 rows or more and by
    5% of the depth.
    """
    config = config or MeasureConfig()
    n = baseline.n_layers
    parts: dict[str, dict[str, float | None]] = {}
    for name, q in DEPTHS.items():
        row = percentile_row(n, q)
        norm = baseline.at("kl_to_final_bits", row)
        gain = _less(norm, tuned.at("kl_to_final_bits", row))
        temp = _less(norm, baseline.at("kl_to_final_bits_norm_temp", row))
        parts[name] = {"ΔKL_tuned": gain, "ΔKL_temp": temp, "ΔKL_rot": _less(gain, temp)}
    return {"percentiles": parts, "prefer_tuned": _prefer(baseline, tuned, parts, config)}


def _prefer(
    baseline: PassRows,
    tuned: PassRows,
    parts: Mapping[str, Mapping[str, float | None]],
    config: MeasureConfig,
) -> bool:
    rotation = parts["p50"]["ΔKL_rot"]
    if rotation is not None and rotation >= config.tuned_rotation_bits:
        return True
    norm, other = _ranks(baseline)["le_5"], _ranks(tuned)["le_5"]
    if norm is None or other is None:
        return False
    depth = round(config.prefer_tuned_depth * baseline.n_layers)
    return norm - other >= max(config.prefer_tuned_rows, depth)


def _ranks(part: PassRows) -> dict[str, int | None]:
    rank = part.floats("answer_rank")
    return {f"le_{k}": first_true(rank <= k, part.layers) for k in RANKS}


def _bits(part: PassRows) -> dict[str, float | None]:
    return {
        name: part.at("kl_to_final_bits", percentile_row(part.n_layers, q))
        for name, q in DEPTHS.items()
    }


def _less(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two
