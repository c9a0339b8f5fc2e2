"""Does the same prompt give the same reading twice: other arithmetic, batch size, attention kernel.

Definitions after the layer-lens reference definitions. Repeating the very same arithmetic proves
nothing, so a repeat differs from the reference in one condition that should not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from layerscope.errors import TableError
from layerscope.measures.agreement import jaccard
from layerscope.measures.config import MeasureConfig
from layerscope.measures.detectors import percentile

TOP_K = 10  # tokens compared at the milestone


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One run of a prompt under one condition, e.g. "bfloat16", "batch of 8" or "eager".

    `milestone` and `layer` are the preferred milestone. `top_ids` holds, per row, the most likely
    tokens; `reference_top1_ranks`, per row in ascending order, the rank that this run gives to the
    token which the reference put first (all 1 for the reference itself); `p_answer`, if known, the
    answer's probability at the last row.
    """

    condition: str
    milestone: str | None
    layer: int | None
    top_ids: Mapping[int, Sequence[int]]
    reference_top1_ranks: Sequence[int]
    p_answer: float | None = None


def rank_deviation(ranks: Int[np.ndarray, " row"], config: MeasureConfig) -> dict[str, Any]:
    """Return how far tokens that were first have moved: largest and 95th percentile of rank - 1.

    `flag` is `repeatability_variance_high` when the largest exceeds 5 or more than 2% of the rows
    have another first token, else `ok`.
    """
    moved = np.abs(ranks.astype(float) - 1.0)
    if not moved.size:
        raise TableError("no rows were decoded twice; give at least one")
    largest, flips = float(moved.max()), float((moved > 0).mean())
    high = largest > config.repeat_rank_dev or flips > config.repeat_flip_rate
    return {
        "layers_checked": int(moved.size),
        "max_rank_dev": largest,
        "p95_rank_dev": percentile(moved, 0.95),
        "top1_flip_rate": flips,
        "flag": "repeatability_variance_high" if high else "ok",
    }


def repeatability(
    repeats: Sequence[Reading], config: MeasureConfig | None = None
) -> dict[str, Any]:
    """Return the deviation of every repeat from the reference, and the worst at the top level.

    Raises TableError without repeats.
    """
    config = config or MeasureConfig()
    if not repeats:
        raise TableError("nothing was repeated; give at least one reading beside the reference")
    found = [
        {
            "condition": item.condition,
            **rank_deviation(np.asarray(item.reference_top1_ranks), config),
        }
        for item in repeats
    ]
    worst = max(found, key=lambda entry: (entry["max_rank_dev"], entry["top1_flip_rate"]))
    high = any(entry["flag"] != "ok" for entry in found)
    return {
        "status": "ok",
        "layers_checked": worst["layers_checked"],
        "max_rank_dev": worst["max_rank_dev"],
        "p95_rank_dev": max(entry["p95_rank_dev"] for entry in found),
        "top1_flip_rate": max(entry["top1_flip_rate"] for entry in found),
        "flag": "repeatability_variance_high" if high else "ok",
        "conditions": found,
    }


def repeatability_forward(
    reference: Reading, repeats: Sequence[Reading], config: MeasureConfig | None = None
) -> dict[str, Any]:
    """Return whether the preferred milestone survives every repeat.

    A repeat passes when it has the same preferred milestone, at most 1 row away, and at the
    reference's row shares half or more (Jaccard) of the 10 most likely tokens. The gate is null
    when the reference reached no milestone. Raises TableError without repeats.
    """
    config = config or MeasureConfig()
    if not repeats:
        raise TableError("nothing was repeated; give at least one reading beside the reference")
    pairs = [_compare(reference, item, config) for item in repeats]
    worst = min(pairs, key=lambda pair: (pair["pass"] is not False, -(pair["delta_layers"] or 0)))
    verdicts = [pair["pass"] for pair in pairs if pair["pass"] is not None]
    return {
        "status": "ok",
        "milestones": {
            "primary": reference.milestone,
            "pass1": {"layer": reference.layer},
            "pass2": {"layer": worst["layer"]},
            "delta_layers": worst["delta_layers"],
        },
        "topk_jaccard_at_primary_layer": worst["jaccard"],
        "gate": {"repeatability_forward_pass": all(verdicts) if verdicts else None},
        "enabled": True,
        "mode": "conditions",
        "tolerance_layers": config.repeat_tolerance_layers,
        "topk_k": TOP_K,
        "reference": reference.condition,
        "conditions": pairs,
    }


def _compare(reference: Reading, other: Reading, config: MeasureConfig) -> dict[str, Any]:
    layer = reference.layer
    delta = None if layer is None or other.layer is None else abs(other.layer - layer)
    overlap = None
    if layer is not None and layer in reference.top_ids and layer in other.top_ids:
        overlap = jaccard(reference.top_ids[layer][:TOP_K], other.top_ids[layer][:TOP_K])
    passed: bool | None = None
    if reference.milestone is not None:
        passed = (
            other.milestone == reference.milestone
            and delta is not None
            and delta <= config.repeat_tolerance_layers
            and (overlap is None or overlap >= config.repeat_jaccard)
        )
    before, after = reference.p_answer, other.p_answer
    return {
        "condition": other.condition,
        "milestone": other.milestone,
        "layer": other.layer,
        "delta_layers": delta,
        "jaccard": overlap,
        "delta_p_answer": None if before is None or after is None else after - before,
        "pass": passed,
    }
