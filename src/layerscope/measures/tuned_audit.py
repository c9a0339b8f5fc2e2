"""What a tuned lens gains by rotating, and what by mere calibration. (Layer-lens reference, 2.16.)

Variants of one row: the norm lens (baseline), the whole translator (tuned), the translator without
its temperature (rot_only), and the norm lens under that temperature (temp_only). A run may add
bias_only, a translator of biases alone that was fitted beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from layerscope.errors import TableError, nearest
from layerscope.measures.config import MeasureConfig, decimal
from layerscope.measures.detectors import percentile

VARIANTS = ("tuned", "rot_only", "temp_only")
VARIANT_COLUMNS: tuple[str, ...] = (
    "layer",
    *(f"kl_bits_{name}" for name in ("baseline", *VARIANTS)),
    *(f"delta_kl_bits_{name}" for name in (*VARIANTS, "interaction")),
    *(f"answer_rank_{name}" for name in ("baseline", *VARIANTS)),
    *(f"rank_shift_{name}" for name in VARIANTS),
    *("entropy_bits_baseline", "entropy_bits_tuned"),
)
POSITION_COLUMNS: tuple[str, ...] = (
    *("pos_frac", "pos_index", "layer", "kl_bits_baseline", "kl_bits_tuned"),
    *("delta_kl_bits_tuned", "answer_rank_baseline", "answer_rank_tuned", "rank_shift_tuned"),
    *("entropy_bits_baseline", "entropy_bits_tuned"),
)


def variant_rows(measured: pl.DataFrame) -> pl.DataFrame:
    """Complete measured rows (kl_bits_*, answer_rank_*, entropy_bits_*) by their differences.

    delta_kl_bits = baseline - variant; interaction = tuned - (rot_only + temp_only); rank_shift =
    baseline - variant. Columns come out in the order of `VARIANT_COLUMNS`, others after them.
    Raises TableError when a measured column is missing.
    """
    _need(measured, [name for name in VARIANT_COLUMNS if not name.startswith(("delta", "rank_"))])
    rows = measured.with_columns(
        *(
            (pl.col("kl_bits_baseline") - pl.col(f"kl_bits_{name}")).alias(f"delta_kl_bits_{name}")
            for name in VARIANTS
        ),
        *(
            (pl.col("answer_rank_baseline") - pl.col(f"answer_rank_{name}")).alias(
                f"rank_shift_{name}"
            )
            for name in VARIANTS
        ),
    )
    parts = pl.col("delta_kl_bits_rot_only") + pl.col("delta_kl_bits_temp_only")
    rows = rows.with_columns(
        (pl.col("delta_kl_bits_tuned") - parts).alias("delta_kl_bits_interaction")
    )
    return rows.select(*VARIANT_COLUMNS, pl.exclude(VARIANT_COLUMNS))


def position_rows(measured: pl.DataFrame) -> pl.DataFrame:
    """Complete rows per grid position and layer by their differences; as `variant_rows`."""
    _need(measured, [name for name in POSITION_COLUMNS if not name.startswith(("delta", "rank_"))])
    rows = measured.with_columns(
        (pl.col("kl_bits_baseline") - pl.col("kl_bits_tuned")).alias("delta_kl_bits_tuned"),
        (pl.col("answer_rank_baseline") - pl.col("answer_rank_tuned")).alias("rank_shift_tuned"),
    )
    return rows.select(*POSITION_COLUMNS, pl.exclude(POSITION_COLUMNS))


def tuned_audit(
    variants: pl.DataFrame,
    positions: pl.DataFrame | None = None,
    *,
    head_mismatch: dict[str, Any] | None = None,
    config: MeasureConfig | None = None,
) -> dict[str, Any]:
    """Return percentiles of the gains, the verdicts on them, and how they hold at other positions.

    `variants` has the columns of `VARIANT_COLUMNS` and the rows of one fact; `positions` those of
    `POSITION_COLUMNS`. A lens is calibration only when it gains at the median, less than 0.2 bits
    by rotation, and 80% or more of the whole by temperature. The hint: calibration only, else tuned
    where the median gain exceeds 0.2 bits, else norm. Raises TableError for missing columns.
    """
    config = config or MeasureConfig()
    _need(variants, [name for name in VARIANT_COLUMNS if name.startswith("delta")])
    gains = {
        name: variants[f"delta_kl_bits_{name}"].cast(pl.Float64).drop_nulls().to_numpy()
        for name in (*VARIANTS, "interaction")
    }
    rotation = {
        f"delta_kl_{label}_{p}": percentile(gains[name], q)
        for label, name in (("rot", "rot_only"), ("temp", "temp_only"))
        for p, q in (("p25", 0.25), ("p50", 0.5), ("p75", 0.75))
    }
    rotation["delta_kl_interaction_p50"] = percentile(gains["interaction"], 0.5)
    rotation["delta_kl_tuned_p50"] = percentile(gains["tuned"], 0.5)
    bias = _bias(variants)
    only = calibration_only(rotation, config)
    return {
        "status": "ok",
        "rotation_vs_temperature": rotation | bias,
        "positional": None if positions is None else positional(positions, config),
        "head_mismatch": head_mismatch,
        "tuned_is_calibration_only": only,
        "preferred_semantics_lens_hint": _hint(rotation["delta_kl_tuned_p50"], only, config),
    }


def calibration_only(gains: dict[str, float | None], config: MeasureConfig) -> bool:
    """Say whether a lens gains only by calibration: little by rotation, most by temperature."""
    rot, temp, tuned = (gains[f"delta_kl_{name}_p50"] for name in ("rot", "temp", "tuned"))
    if rot is None or temp is None or tuned is None:
        return False
    little = rot < config.tuned_rotation_bits
    return tuned > 0.0 and little and temp >= config.tuned_temperature_share * tuned


def positional(positions: pl.DataFrame, config: MeasureConfig) -> dict[str, Any]:
    """Return the median gain at positions like those of the fit, at later ones, and its change."""
    _need(positions, ["pos_frac", "delta_kl_bits_tuned"])
    fractions = positions["pos_frac"].to_numpy().astype(float)
    gains = positions["delta_kl_bits_tuned"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    low, high = config.position_in_dist, config.position_ood
    inside = percentile(gains[fractions <= low], 0.5)
    outside = percentile(gains[fractions >= high], 0.5)
    return {
        "pos_grid": sorted(set(fractions.tolist())),
        f"pos_in_dist_le_{decimal(low)}": inside,
        f"pos_ood_ge_{decimal(high)}": outside,
        "pos_ood_gap": None if inside is None or outside is None else outside - inside,
    }


def _bias(variants: pl.DataFrame) -> dict[str, float | None]:
    """Return the median gain of a translator of biases alone, where one was fitted beside it."""
    if "kl_bits_bias_only" not in variants.columns:
        return {}
    gain = (variants["kl_bits_baseline"] - variants["kl_bits_bias_only"]).cast(pl.Float64)
    return {"delta_kl_bias_p50": percentile(gain.drop_nulls().to_numpy().astype(np.float64), 0.5)}


def _hint(tuned: float | None, only: bool, config: MeasureConfig) -> str:
    if only:
        return "tuned_for_calibration_only"
    return "tuned" if tuned is not None and tuned > config.tuned_rotation_bits else "norm"


def _need(frame: pl.DataFrame, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in frame.columns]
    if missing:
        hint = nearest(missing[0], frame.columns)
        raise TableError(f"the audit lacks the column(s) {', '.join(missing)}{hint}")
