from __future__ import annotations

from typing import Any

import pytest

from layerscope.measures.config import MeasureConfig
from layerscope.measures.raw_norm import RawNorm, artefact_score, median_score, window_radius
from support.hand_made import hand_made_pass, hand_made_table, one_pass

CONFIG = MeasureConfig()


def pair(norm: dict[str, list[Any]], raw: dict[str, list[Any]], **kwargs: Any) -> RawNorm:
    table = hand_made_table({"norm": norm, "raw": raw}, **kwargs)
    return RawNorm(one_pass(table, "norm"), one_pass(table, "raw"))


def ranks(norm: list[int | None], raw: list[int | None], kl: list[float | None]) -> RawNorm:
    return pair({"answer_rank": norm, "kl_norm_vs_raw_bits": kl}, {"answer_rank": raw})


def test_norm_only_needs_rank_one_and_a_known_other_rank() -> None:
    check = ranks([1, 1, 2, 1, None], [2, 1, 2, None, 2], [0.0] * 5)
    assert check.norm_only.tolist() == [True, False, False, False, False]


def test_spot_checks_sit_after_each_quarter() -> None:
    n = 42
    check = ranks([2] * (n + 1), [2] * (n + 1), [0.0] * (n + 1))
    assert [s["layer"] for s in check.sample(CONFIG)["samples"]] == [0, 11, 22, 32]
    tiny = ranks([2, 2], [2, 2], [0.0, 0.0])
    assert [s["layer"] for s in tiny.sample(CONFIG)["samples"]] == [0, 1]


@pytest.mark.parametrize(
    ("kl", "risk"), [(0.49, "low"), (0.5, "medium"), (0.99, "medium"), (1.0, "high")]
)
def test_risk_by_divergence(kl: float, risk: str) -> None:
    check = ranks([2] * 5, [2] * 5, [kl] + [0.0] * 4)
    summary = check.sample(CONFIG)["summary"]
    assert (summary["lens_artifact_risk"], summary["max_kl_norm_vs_raw_bits"]) == (risk, kl)


def test_risk_by_norm_only_row() -> None:
    check = ranks([2, 2, 2, 2, 1], [2] * 5, [0.0] * 5)
    summary = check.sample(CONFIG)["summary"]
    assert (summary["lens_artifact_risk"], summary["first_norm_only_semantic_layer"]) == ("high", 4)


def test_risk_looks_at_the_spots_only() -> None:
    n = 16
    kl = [9.0] * (n + 1)
    for spot in (0, 5, 9, 13):
        kl[spot] = 0.1
    assert ranks([2] * (n + 1), [2] * (n + 1), kl).sample(CONFIG)["summary"] == {
        "first_norm_only_semantic_layer": None,
        "max_kl_norm_vs_raw_bits": 0.1,
        "lens_artifact_risk": "low",
    }


def test_sample_fields() -> None:
    check = pair(
        {"answer_rank": [1], "p_top1": [0.5], "p_answer": [0.5], "top_ids": [[7, 8]]},
        {"answer_rank": [None], "p_top1": [0.4], "p_answer": [None], "top_ids": [[7, 9]]},
        n_layers=0,
    )
    (sample,) = check.sample(CONFIG)["samples"]
    assert sample == {
        "layer": 0,
        "kl_norm_vs_raw_bits": None,
        "top1_agree": True,
        "p_top1_norm": 0.5,
        "p_top1_raw": 0.4,
        "p_answer_norm": 0.5,
        "p_answer_raw": None,
        "answer_rank_norm": 1,
        "answer_rank_raw": None,
        "is_answer_norm": True,
        "is_answer_raw": None,
    }


@pytest.mark.parametrize(
    ("norm", "raw", "agree"),
    [
        ({"top_ids": [[7]]}, {"top_ids": [[8]]}, False),
        ({"top_tokens": [[" a"]]}, {"top_tokens": [[" a"]]}, True),
        ({"top_ids": [[None]], "top_tokens": [[" a"]]}, {"top_tokens": [[" b"]]}, False),
        ({"p_top1": [0.5]}, {"p_top1": [0.5]}, None),
    ],
)
def test_agreement_by_id_else_by_text(norm: Any, raw: Any, agree: bool | None) -> None:
    (sample,) = pair(norm, raw, n_layers=0).sample(CONFIG)["samples"]
    assert sample["top1_agree"] is agree


def test_window_is_clipped_and_joined() -> None:
    norm = [2, 1, 2, 2, 2, 2, 2, 1, 1]
    check = ranks(norm, [2] * 9, [0.1, 0.2, 9.0, 9.0, 9.0, 0.3, 0.4, None, 0.5])
    assert check.window([7, 0, 7], radius=1) == {
        "radius": 1,
        "center_layers": [0, 7],
        "layers_checked": [0, 1, 6, 7, 8],
        "norm_only_semantics_layers": [1, 7, 8],
        "max_kl_norm_vs_raw_bits_window": 0.5,
        "mode": "window",
    }
    assert check.window([], radius=4)["layers_checked"] == []


def test_window_widens_with_the_facts_own_risk() -> None:
    low = ranks([2] * 5, [2] * 5, [0.1] * 5).sample(CONFIG)
    high = ranks([2] * 5, [2] * 5, [1.0] * 5).sample(CONFIG)
    assert (window_radius(low, CONFIG), window_radius(high, CONFIG)) == (4, 8)


def test_full_sweep() -> None:
    check = pair(
        {
            "answer_rank": [2, 1, 1, 1],
            "kl_norm_vs_raw_bits": [0.4, 0.5, 1.0, 6.0],
            "js_norm_raw_bits": [0.2, 0.1, 0.1, 0.3],
            "l1_norm_raw": [0.6, 0.5, 0.7, 0.8],
            "topk_jaccard_raw_norm": [0.1, 0.49, 0.5, 0.9],
            "teacher_entropy_bits": [3.0] * 4,
        },
        {"answer_rank": [2, 1, 3, 2]},
    )
    full = check.full(CONFIG)
    assert (full["pct_layers_kl_ge_1.0"], full["pct_layers_kl_ge_0.5"]) == (0.5, 0.75)
    assert full["norm_only_semantics_layers"] == [2, 3]
    assert (full["n_norm_only_semantics_layers"], full["earliest_norm_only_semantic"]) == (2, 2)
    assert (full["first_js_le_0.1"], full["first_l1_le_0.5"]) == (1, 1)
    assert full["topk_overlap"]["first_jaccard_raw_norm_ge_0.5"] == 2
    assert full["js_divergence_percentiles"]["p50"] == pytest.approx(0.15)
    score = full["score"]
    assert score["lens_artifact_score"] == pytest.approx(0.6 * 0.5 + 0.3 + 0.1)
    assert score["lens_artifact_score_v2"] == pytest.approx(0.7 + 0.1 + 0.05)
    assert score["tier"] == "high"


def test_names_follow_the_thresholds() -> None:
    check = ranks([2] * 3, [2] * 3, [0.2, 0.3, 3.0])
    config = MeasureConfig(
        raw_kl_high_bits=2,
        raw_kl_medium_bits=0.25,
        js_threshold_bits=0.05,
        l1_threshold=1.0,
        jaccard_threshold=0.75,
    )
    full = check.full(config)
    assert (full["pct_layers_kl_ge_2.0"], full["pct_layers_kl_ge_0.25"]) == (1 / 3, 2 / 3)
    assert {"first_js_le_0.05", "first_l1_le_1.0"} <= full.keys()
    assert "first_jaccard_raw_norm_ge_0.75" in full["topk_overlap"]
    old = {"pct_layers_kl_ge_1.0", "pct_layers_kl_ge_0.5", "first_js_le_0.1", "first_l1_le_0.5"}
    assert not old & full.keys()


def test_rows_that_only_one_lens_has_are_left_out() -> None:
    norm = hand_made_pass(answer_rank=[1, 1, 1], kl_norm_vs_raw_bits=[9.0, 0.1, 0.1])
    raw = hand_made_pass("raw", layers=[1, 2], answer_rank=[2, 1])
    check = RawNorm(norm, raw)
    assert check.layers.tolist() == [1, 2]
    assert check.norm_only.tolist() == [True, False]
    assert check.full(CONFIG)["max_kl_norm_vs_raw_bits"] == 0.1


def score(**values: Any) -> dict[str, Any]:
    given = {"share_high": 0.0, "norm_only": 0, "max_kl": 0.0, "js_p50": 0.0, "l1_p50": 0.0}
    return artefact_score(**(given | values), config=CONFIG)


def test_score_weights_and_tiers() -> None:
    assert score() == {"lens_artifact_score": 0.0, "lens_artifact_score_v2": 0.0, "tier": "low"}
    assert score(norm_only=3)["lens_artifact_score"] == 0.3
    assert score(max_kl=50.0)["lens_artifact_score"] == pytest.approx(0.1)
    assert score(max_kl=2.5)["lens_artifact_score"] == pytest.approx(0.05)
    assert score(share_high=0.34)["tier"] == "medium"
    assert score(share_high=0.5, norm_only=1)["tier"] == "high"
    exact = MeasureConfig(score_weights=(0.5, 0.25, 0.25))
    edge = {"max_kl": 0.0, "js_p50": 0.0, "l1_p50": 0.0, "config": exact}
    assert artefact_score(share_high=1.0, norm_only=0, **edge)["tier"] == "medium"  # 0.5
    fifth = MeasureConfig(score_weights=(0.2, 0.0, 0.0))
    assert artefact_score(share_high=1.0, norm_only=0, **(edge | {"config": fifth}))["tier"] == (
        "medium"
    )  # 0.2


def test_second_score_is_clipped() -> None:
    full = score(share_high=1.0, norm_only=1, max_kl=9.0, js_p50=1.0, l1_p50=2.0)
    assert full["lens_artifact_score_v2"] == 1.0
    assert score(js_p50=0.05, l1_p50=0.25)["lens_artifact_score_v2"] == pytest.approx(0.075)


def test_unknown_values_weigh_nothing() -> None:
    assert score(max_kl=None, js_p50=None, l1_p50=None)["lens_artifact_score_v2"] == 0.0
    assert median_score([{"score": score(norm_only=1)}, {"score": score()}]) == pytest.approx(0.15)
    assert median_score([]) is None
