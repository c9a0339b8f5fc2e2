"""How far the norm lens owes its reading to the normalisation: the raw lens beside it, row by row.

Definitions after the layer-lens reference definitions. Divergences are bits, L1 lies in [0, 2].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from layerscope.measures.config import MeasureConfig, decimal
from layerscope.measures.detectors import first_true, median, percentile, quartiles
from layerscope.measures.rows import PassRows
from layerscope.measures.table import JACCARD_K


class RawNorm:
    """One fact through both lenses, on the rows that both have."""

    def __init__(self, norm: PassRows, raw: PassRows) -> None:
        _, rows, other = np.intersect1d(norm.layers, raw.layers, return_indices=True)
        self.norm, self.raw, self.n_layers = norm, raw, norm.n_layers
        self.layers: Int[np.ndarray, " row"] = norm.layers[rows]
        self._rows, self._other = rows, other
        self.kl = norm.floats("kl_norm_vs_raw_bits")[rows]
        self.rank_norm = norm.floats("answer_rank")[rows]
        self.rank_raw = raw.floats("answer_rank")[other]

    @property
    def norm_only(self) -> Bool[np.ndarray, " row"]:
        """Rows where the answer is rank 1 under norm and known not to be under raw."""
        return (self.rank_norm == 1) & (self.rank_raw > 1)

    def column(self, name: str) -> np.ndarray:
        """Return a column of the norm rows, on the common rows."""
        return self.norm.floats(name)[self._rows]

    def sample(self, config: MeasureConfig) -> dict[str, Any]:
        """Return four spot checks (row 0 and the rows after 25%, 50% and 75% of the blocks)."""
        n = self.n_layers
        wanted = {0, *(min(n, n * quarter // 4 + 1) for quarter in (1, 2, 3))}
        chosen = np.isin(self.layers, sorted(wanted))
        largest = _max(self.kl[chosen])
        only = chosen & self.norm_only
        if only.any() or (largest is not None and largest >= config.raw_kl_high_bits):
            risk = "high"
        elif largest is not None and largest >= config.raw_kl_medium_bits:
            risk = "medium"
        else:
            risk = "low"
        return {
            "mode": "sample",
            "samples": [self._sample(int(index)) for index in np.flatnonzero(chosen)],
            "summary": {
                "first_norm_only_semantic_layer": first_true(only, self.layers),
                "max_kl_norm_vs_raw_bits": largest,
                "lens_artifact_risk": risk,
            },
        }

    def _sample(self, index: int) -> dict[str, Any]:
        layer = int(self.layers[index])
        rank_norm, rank_raw = self.rank_norm[index], self.rank_raw[index]
        return {
            "layer": layer,
            "kl_norm_vs_raw_bits": _number(self.kl[index]),
            "top1_agree": self._same_top1(index),
            "p_top1_norm": self.norm.at("p_top1", layer),
            "p_top1_raw": self.raw.at("p_top1", layer),
            "p_answer_norm": self.norm.at("p_answer", layer),
            "p_answer_raw": self.raw.at("p_answer", layer),
            "answer_rank_norm": _whole(rank_norm),
            "answer_rank_raw": _whole(rank_raw),
            "is_answer_norm": None if np.isnan(rank_norm) else bool(rank_norm == 1),
            "is_answer_raw": None if np.isnan(rank_raw) else bool(rank_raw == 1),
        }

    def _same_top1(self, index: int) -> bool | None:
        """Say whether both lenses have the same most likely token; by text where ids lack."""
        for name in ("top_ids", "top_tokens"):
            norm = self.norm.entries(name, 0)[self._rows[index]]
            raw = self.raw.entries(name, 0)[self._other[index]]
            if norm is not None and raw is not None:
                return bool(norm == raw)
        return None

    def window(self, centers: list[int], *, radius: int) -> dict[str, Any]:
        """Return the rows within `radius` of any centre: norm-only rows and the largest KL."""
        centers = sorted(set(centers))
        near = np.zeros(len(self.layers), dtype=bool)
        for center in centers:
            near |= np.abs(self.layers - center) <= radius
        return {
            "radius": radius,
            "center_layers": centers,
            "layers_checked": self.layers[near].tolist(),
            "norm_only_semantics_layers": self.layers[near & self.norm_only].tolist(),
            "max_kl_norm_vs_raw_bits_window": _max(self.kl[near]),
            "mode": "window",
        }

    def full(self, config: MeasureConfig) -> dict[str, Any]:
        """Return the sweep over every row, with the artefact score and its tier."""
        js, l1 = self.column("js_norm_raw_bits"), self.column("l1_norm_raw")
        jaccard = self.column("topk_jaccard_raw_norm")
        only, rows = self.norm_only, max(1, len(self.layers))
        share_high = float((self.kl >= config.raw_kl_high_bits).sum()) / rows
        share_medium = float((self.kl >= config.raw_kl_medium_bits).sum()) / rows
        largest = _max(self.kl)
        return {
            f"pct_layers_kl_ge_{decimal(config.raw_kl_high_bits)}": share_high,
            f"pct_layers_kl_ge_{decimal(config.raw_kl_medium_bits)}": share_medium,
            "n_norm_only_semantics_layers": int(only.sum()),
            "norm_only_semantics_layers": self.layers[only].tolist(),
            "earliest_norm_only_semantic": first_true(only, self.layers),
            "max_kl_norm_vs_raw_bits": largest,
            "mode": "full",
            "js_divergence_percentiles": quartiles(js),
            "l1_prob_diff_percentiles": quartiles(l1),
            f"first_js_le_{decimal(config.js_threshold_bits)}": first_true(
                js <= config.js_threshold_bits, self.layers
            ),
            f"first_l1_le_{decimal(config.l1_threshold)}": first_true(
                l1 <= config.l1_threshold, self.layers
            ),
            "teacher_entropy_bits": _first_known(self.column("teacher_entropy_bits")),
            "topk_overlap": {
                "K": JACCARD_K,
                "jaccard_raw_norm_p50": percentile(jaccard, 0.5),
                f"first_jaccard_raw_norm_ge_{decimal(config.jaccard_threshold)}": first_true(
                    jaccard >= config.jaccard_threshold, self.layers
                ),
            },
            "score": artefact_score(
                share_high=share_high,
                norm_only=int(only.sum()),
                max_kl=largest,
                js_p50=percentile(js, 0.5),
                l1_p50=percentile(l1, 0.5),
                config=config,
            ),
        }


def artefact_score(
    *,
    share_high: float,
    norm_only: int,
    max_kl: float | None,
    js_p50: float | None,
    l1_p50: float | None,
    config: MeasureConfig,
) -> dict[str, Any]:
    """Return the lens artefact score in [0, 1], its second version and the tier of the first.

    The first weighs the share of rows with KL >= 1 bit, whether any row is right under norm alone,
    and the largest KL against 5 bits. The second adds the medians of JS and L1, clipped to [0, 1].
    Tiers: low below 0.2, medium up to and including 0.5, high above.
    """
    weights, addends = config.score_weights, config.score_v2_addends
    score = (
        weights[0] * share_high
        + weights[1] * (1.0 if norm_only > 0 else 0.0)
        + weights[2] * min(1.0, (max_kl or 0.0) / 5.0)
    )
    second = (
        score
        + addends[0] * min(1.0, (js_p50 or 0.0) / config.js_threshold_bits)
        + addends[1] * min(1.0, (l1_p50 or 0.0) / config.l1_threshold)
    )
    low, high = config.score_tiers
    return {
        "lens_artifact_score": score,
        "lens_artifact_score_v2": min(1.0, max(0.0, second)),
        "tier": "low" if score < low else "medium" if score <= high else "high",
    }


def window_radius(sample: dict[str, Any], config: MeasureConfig) -> int:
    """Return the radius of the window: the wide one when the fact's own spot checks look risky."""
    risky = sample["summary"]["lens_artifact_risk"] == "high"
    return config.window_radius_high if risky else config.window_radius


def median_score(checks: list[dict[str, Any]]) -> float | None:
    """Return the median artefact score over facts."""
    return median([check["score"]["lens_artifact_score"] for check in checks])


def _max(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else None


def _first_known(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known[0]) if known.size else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _whole(value: float) -> int | None:
    return None if np.isnan(value) else int(value)
