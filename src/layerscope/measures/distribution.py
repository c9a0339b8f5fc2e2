"""Where the distribution stands against the model's own: entropy gaps and divergence by depth."""

from __future__ import annotations

from typing import Any

import numpy as np

from layerscope.measures.detectors import percentile_row, quartiles
from layerscope.measures.rows import PassRows

DEPTHS = {"p25": 0.25, "p50": 0.50, "p75": 0.75}


def entropy_gap_fields(part: PassRows) -> dict[str, Any]:
    """Return percentiles of lens entropy - model entropy (bits) over the rows of one pass."""
    gap = part.floats("entropy_bits") - part.floats("teacher_entropy_bits")
    return {
        "entropy_gap_bits_percentiles": quartiles(gap),
        "entropy_gap_samples": int((~np.isnan(gap)).sum()),
    }


def kl_fields(part: PassRows) -> dict[str, Any]:
    """Return KL(lens || model), bits, at 25, 50 and 75% of the depth; tempered too where known."""
    fields: dict[str, Any] = {
        "kl_bits_at_percentiles": {
            name: part.at("kl_to_final_bits", percentile_row(part.n_layers, q))
            for name, q in DEPTHS.items()
        }
    }
    if part.has("kl_to_final_bits_norm_temp"):
        for name, q in DEPTHS.items():
            row = percentile_row(part.n_layers, q)
            fields[f"kl_to_final_bits_norm_temp@{name[1:]}%"] = {
                "layer": row,
                "value": part.at("kl_to_final_bits_norm_temp", row),
            }
    return fields
