"""Every gate on numbers made to pass it and on numbers made to fail it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from layerscope.measures.config import MeasureConfig
from layerscope.measures.decoding_point import Decoded, decoding_point
from layerscope.measures.gate_stability import gate_stability, scaled_row
from layerscope.measures.last_row import last_row_warns
from layerscope.measures.lens_consistency import LensRow, lens_consistency
from layerscope.measures.position_window import position_window
from layerscope.measures.raw_norm import artefact_score
from layerscope.measures.repeatability import Reading, repeatability, repeatability_forward
from layerscope.measures.skip_layers import skip_layers
from layerscope.measures.softcap import cap, fit_softcap
from layerscope.measures.summary import summarise
from layerscope.measures.tuned_audit import tuned_audit, variant_rows
from measures.test_guidance import NORM, last_row_kl, sound_table, where
from measures.test_tuned_audit import variants

CONFIG = MeasureConfig()
TOP = tuple(range(50))
RUN = Reading(
    condition="float32",
    milestone="L_semantic",
    layer=8,
    top_ids={8: TOP},
    reference_top1_ranks=(1,) * 13,
)
FIRST = Decoded(top_ids=TOP, p_top1=0.4, answer_rank=1, p_answer=0.4)


def readings(**change: Any) -> Reading:
    return replace(RUN, condition="bfloat16", **change)


def logits(lead: float) -> np.ndarray:
    z = np.random.default_rng(0).normal(size=64) - 4.0
    z[5], z[6] = 3.0 + lead, 3.0
    return z


def stable_gate(lead: float) -> bool:
    row = scaled_row(logits(lead), 5, CONFIG.gate_scales)
    found = gate_stability({"L_semantic_strong": 3}, {3: row}, d_vocab=64)
    return found["min_both_gates_pass_frac"] >= CONFIG.gate_pass_share


def consistent(ranks: tuple[int, ...]) -> bool:
    row = LensRow(reference=TOP, other=tuple(sorted(TOP, key=lambda t: ranks[t])), ranks=ranks)
    return not lens_consistency({"L_semantic": 4}, {"raw": {4: row}})["low_at_semantic"]


def low_artefact(share: float, norm_only: int) -> bool:
    found = artefact_score(
        share_high=share, norm_only=norm_only, max_kl=1.0, js_p50=0.0, l1_p50=0.0, config=CONFIG
    )
    return found["tier"] != "high"


def capped(softcap: float) -> bool:
    z = np.sort(np.random.default_rng(2).normal(size=20) * 20)[::-1]
    p, q = np.exp(z - z[0]), np.exp(cap(z, 30.0) - cap(z, 30.0)[0])
    return fit_softcap(p.tolist(), q.tolist(), softcap=softcap).max_error < 1e-4


def silent(code: str, change: Callable[..., Any] | None = None) -> bool:
    """Say whether guidance on the sound table, changed, gives no reason of that code."""
    table = sound_table()
    summary = summarise(change(table) if change else table).to_dict()
    return code not in {reason["code"] for reason in summary["measurement_guidance"]["reasons"]}


def without_fact(column: str, value: Any) -> Callable[..., Any]:
    return where(NORM & (pl.col("prompt_id") == "pos"), **{column: value})


# Gate, numbers that pass it, numbers that fail it.
CASES: tuple[tuple[str, Callable[[], bool | None], Callable[[], bool | None]], ...] = (
    (
        "repeatability",
        lambda: repeatability([readings()])["flag"] == "ok",
        lambda: repeatability([readings(reference_top1_ranks=(1,) * 12 + (7,))])["flag"] == "ok",
    ),
    (
        "forward of two",
        lambda: repeatability_forward(RUN, [readings(layer=9)])["gate"][
            "repeatability_forward_pass"
        ],
        lambda: repeatability_forward(RUN, [readings(layer=10)])["gate"][
            "repeatability_forward_pass"
        ],
    ),
    (
        "decoding point",
        lambda: decoding_point([("L", 3)], {"final": {3: FIRST}, "next_norm": {3: FIRST}})["gate"][
            "decoding_point_consistent"
        ],
        lambda: decoding_point(
            [("L", 3)],
            {"final": {3: FIRST}, "next_norm": {3: replace(FIRST, answer_rank=2)}},
        )["gate"]["decoding_point_consistent"],
    ),
    ("gate stability", lambda: stable_gate(0.6), lambda: stable_gate(0.51)),
    ("lens consistency", lambda: consistent(TOP), lambda: consistent(TOP[::-1])),
    (
        "position window",
        lambda: position_window({0.2: {4: 1}, 1.0: {4: 3}}, semantic=4)["gate"][
            "position_window_stable"
        ],
        lambda: position_window({0.2: {4: 2}, 1.0: {4: 3}}, semantic=4)["gate"][
            "position_window_stable"
        ],
    ),
    (
        "skip layers",
        lambda: not skip_layers(3.0, {2: 3.04}, tokens=99)["tuned_lens_regression"],
        lambda: not skip_layers(3.0, {2: 3.06}, tokens=99)["tuned_lens_regression"],
    ),
    (
        "tuned is more than calibration",
        lambda: not tuned_audit(variant_rows(variants(1.0, 0.5, 0.4)))["tuned_is_calibration_only"],
        lambda: not tuned_audit(variant_rows(variants(1.0, 0.1, 0.9)))["tuned_is_calibration_only"],
    ),
    ("artefact score", lambda: low_artefact(0.5, 0), lambda: low_artefact(0.5, 1)),
    (
        "last row",
        lambda: not last_row_warns(0.24, 0.0, CONFIG),
        lambda: not last_row_warns(0.30, 0.04, CONFIG),
    ),
    ("softcap", lambda: capped(30.0), lambda: capped(31.0)),
    (
        "numeric health",
        lambda: silent("numeric_health_caution"),
        lambda: silent("numeric_health_caution", without_fact("nonfinite", True)),
    ),
    (
        "last row, guidance",
        lambda: silent("warn_high_last_layer_kl", last_row_kl(0.2)),
        lambda: silent("warn_high_last_layer_kl", last_row_kl(0.3)),
    ),
    (
        "control",
        lambda: silent("control_not_separated"),
        lambda: silent(
            "control_not_separated", where(pl.col("prompt_id") == "ctl", control_margin=0.01)
        ),
    ),
    (
        "confirmation",
        lambda: silent("semantics_unconfirmed"),
        lambda: silent("semantics_unconfirmed", where(pl.col("lens") == "raw", answer_rank=9)),
    ),
    (
        "margin",
        lambda: silent("rank_only_near_uniform"),
        lambda: silent("rank_only_near_uniform", without_fact("p_answer", 0.0063)),
    ),
    (
        "stability of the onset",
        lambda: silent("semantics_not_stable"),
        lambda: silent(
            "semantics_not_stable", where(NORM & (pl.col("layer") == 10), answer_rank=2)
        ),
    ),
)


@pytest.mark.parametrize(("name", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_a_gate_passes_and_fails(
    name: str, good: Callable[[], bool | None], bad: Callable[[], bool | None]
) -> None:
    assert good() is True, f"{name} fails on numbers made to pass it"
    assert bad() is False, f"{name} passes on numbers made to fail it"
