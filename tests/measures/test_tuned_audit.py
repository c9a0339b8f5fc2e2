"""Gains of a tuned lens: differences of rows, percentiles, verdicts; figures of the publisher."""

from __future__ import annotations

import polars as pl
import pytest

from layerscope.errors import TableError
from layerscope.measures.tuned_audit import (
    POSITION_COLUMNS,
    VARIANT_COLUMNS,
    position_rows,
    tuned_audit,
    variant_rows,
)


def variants(tuned: float, rot: float, temp: float, **more: float) -> pl.DataFrame:
    """Return three rows of a norm lens 5 bits away and gains of the given sizes."""
    n = 3
    measured = {
        "layer": [1, 2, 3],
        "kl_bits_baseline": [5.0] * n,
        "kl_bits_tuned": [5.0 - tuned] * n,
        "kl_bits_rot_only": [5.0 - rot] * n,
        "kl_bits_temp_only": [5.0 - temp] * n,
        **{f"answer_rank_{name}": [9, 4, 1] for name in ("baseline", "temp_only")},
        **{f"answer_rank_{name}": [5, 5, 1] for name in ("tuned", "rot_only")},
        "entropy_bits_baseline": [3.0] * n,
        "entropy_bits_tuned": [2.0] * n,
    }
    return pl.DataFrame(measured | {name: [5.0 - value] * n for name, value in more.items()})


def test_rows_are_completed_by_their_differences() -> None:
    rows = variant_rows(variants(2.0, 1.0, 0.25))
    assert tuple(rows.columns) == VARIANT_COLUMNS
    assert rows["delta_kl_bits_tuned"].to_list() == [2.0] * 3
    assert rows["delta_kl_bits_interaction"].to_list() == [0.75] * 3
    assert rows["rank_shift_tuned"].to_list() == [4, -1, 0]
    extra = variant_rows(variants(2.0, 1.0, 0.25, kl_bits_bias_only=0.5))
    assert extra.columns[-1] == "kl_bits_bias_only"
    with pytest.raises(TableError, match=r"lacks the column\(s\) kl_bits_tuned"):
        variant_rows(variants(1, 1, 1).drop("kl_bits_tuned"))


@pytest.mark.parametrize(
    ("gains", "only", "hint"),
    [
        ((2.0, 1.5, 0.3), False, "tuned"),
        ((1.0, 0.1, 0.9), True, "tuned_for_calibration_only"),
        ((1.0, 0.3, 0.9), False, "tuned"),
        ((1.0, 0.1, 0.7), False, "tuned"),
        ((0.1, 0.1, 0.0), False, "norm"),
        # A lens that is worse than its baseline calibrates nothing.
        ((-1.0, -0.6, -0.5), False, "norm"),
    ],
)
def test_verdicts(gains: tuple[float, float, float], only: bool, hint: str) -> None:
    found = tuned_audit(variant_rows(variants(*gains)))
    assert found["tuned_is_calibration_only"] is only
    assert found["preferred_semantics_lens_hint"] == hint
    assert found["rotation_vs_temperature"]["delta_kl_rot_p25"] == pytest.approx(gains[1])
    assert found["positional"] is None


def test_what_biases_alone_gain() -> None:
    found = tuned_audit(variant_rows(variants(2.0, 1.0, 0.25, kl_bits_bias_only=0.5)))
    assert found["rotation_vs_temperature"]["delta_kl_bias_p50"] == pytest.approx(0.5)


def test_gains_at_other_positions() -> None:
    fractions = [0.2, 0.92, 0.94, 0.96, 1.0]
    measured = pl.DataFrame(
        {
            "pos_frac": fractions,
            "pos_index": [2, 9, 10, 11, 12],
            "layer": [4] * 5,
            "kl_bits_baseline": [5.0] * 5,
            "kl_bits_tuned": [1.0, 3.0, 5.0, 4.0, 4.5],
            "answer_rank_baseline": [None, None, None, None, 7],
            "answer_rank_tuned": [None, None, None, None, 2],
            "entropy_bits_baseline": [3.0] * 5,
            "entropy_bits_tuned": [2.0] * 5,
        }
    )
    rows = position_rows(measured)
    assert tuple(rows.columns) == POSITION_COLUMNS
    assert rows["rank_shift_tuned"].to_list() == [None] * 4 + [5]
    found = tuned_audit(variant_rows(variants(1, 1, 0)), rows)["positional"]
    assert found == {
        "pos_grid": fractions,
        "pos_in_dist_le_0.92": 3.0,
        "pos_ood_ge_0.96": 0.75,
        "pos_ood_gap": -2.25,
    }
    inside = tuned_audit(variant_rows(variants(1, 1, 0)), rows.head(2))["positional"]
    assert (inside["pos_ood_ge_0.96"], inside["pos_ood_gap"]) == (None, None)
    with pytest.raises(TableError, match="pos_frac"):
        tuned_audit(variant_rows(variants(1, 1, 0)), rows.drop("pos_frac"))
