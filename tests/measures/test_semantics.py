from __future__ import annotations

from typing import Any

import pytest

from layerscope.measures.config import MeasureConfig
from layerscope.measures.rows import PassRows
from layerscope.measures.semantics import (
    confirmed_semantics,
    is_answer,
    run_overlaps_window,
    semantic_fields,
    semantic_fractions,
    semantic_milestones,
)
from support.hand_made import D_VOCAB, hand_made_pass

CONFIG = MeasureConfig()


def firsts(part: PassRows) -> dict[str, int | None]:
    found = semantic_milestones(part, CONFIG, d_vocab=D_VOCAB)
    return {name: item.first for name, item in found.items()}


def test_ranks_are_inclusive() -> None:
    layers = firsts(hand_made_pass(answer_rank=[11, 10, 6, 5, 2, 1]))
    assert layers["first_rank_le_10"] == 1
    assert layers["first_rank_le_5"] == 3
    assert layers["first_rank_le_1"] == layers["L_semantic"] == 5


def test_kl_thresholds_are_inclusive() -> None:
    layers = firsts(hand_made_pass(kl_to_final_bits=[1.01, 1.0, 0.51, 0.5]))
    assert (layers["first_kl_below_1.0"], layers["first_kl_below_0.5"]) == (1, 3)


def test_cosine_thresholds_are_inclusive() -> None:
    layers = firsts(hand_made_pass(cos_to_final=[None, 0.19, 0.2, 0.59, 0.6]))
    assert [layers[f"cos_ge_{t}"] for t in ("0.2", "0.4", "0.6")] == [2, 3, 4]


def test_margin_is_inclusive_and_needs_rank_one() -> None:
    exact = 0.002 + 1 / D_VOCAB  # 0.003 - 0.001 in floats is a hair below 0.002; this is not
    assert exact - 1 / D_VOCAB >= 0.002
    part = hand_made_pass(answer_rank=[2, 1, 1, 1], p_answer=[0.4, 0.0029, exact, 0.5])
    layers = firsts(part)
    assert (layers["L_semantic"], layers["L_semantic_margin_ok"]) == (1, 2)


def test_gap_is_inclusive_and_strong_needs_all_three() -> None:
    part = hand_made_pass(
        answer_rank=[1, 1, 1, 1, 2],
        p_answer=[0.001, 0.5, 0.001, 0.5, 0.4],
        answer_logit_gap=[0.5, 0.49, 1.0, 0.5, None],
    )
    layers = firsts(part)
    assert layers["L_semantic_top2_ok"] == layers["gap_ge_0.5"] == 0
    assert layers["gap_ge_1.0"] == 2
    assert layers["L_semantic_margin_ok"] == 1
    assert layers["L_semantic_strong"] == 3
    assert layers["L_semantic_strong_run2"] is None


def test_runs_of_two() -> None:
    part = hand_made_pass(
        answer_rank=[1, 2, 1, 1, 1],
        p_answer=[0.5] * 5,
        answer_logit_gap=[1.0, None, 0.1, 1.0, 1.0],
    )
    found = semantic_milestones(part, CONFIG, d_vocab=D_VOCAB)
    assert found["L_semantic"].lost == (1,)
    assert (found["L_semantic"].first, found["L_semantic"].stable) == (0, 2)
    assert (found["L_semantic_run2"].first, found["L_semantic_run2"].stable) == (2, 2)
    assert found["L_semantic_strong_run2"].first == 3


def test_a_rank_that_is_reached_on_the_last_row_only_is_no_run() -> None:
    assert firsts(hand_made_pass(answer_rank=[3, 1]))["L_semantic_run2"] is None


def test_one_row() -> None:
    layers = firsts(hand_made_pass(answer_rank=[1], n_layers=1))
    assert (layers["L_semantic"], layers["L_semantic_run2"]) == (0, None)


def test_nulls_are_never_true() -> None:
    assert set(firsts(hand_made_pass(answer_rank=[None, None])).values()) == {None}


def test_text_decides_only_where_the_rank_is_unknown() -> None:
    part = hand_made_pass(
        answer_rank=[None, None, 2, 1],
        top_tokens=[[" Berlin"], [" Paris"], [" Berlin"], [None]],
        prompt={"answer": "Berlin"},
    )
    assert is_answer(part).tolist() == [True, False, False, True]
    unknown = hand_made_pass(answer_rank=[None], top_tokens=[[" Berlin"]], n_layers=1)
    assert is_answer(unknown).tolist() == [False]


def fields(confirmed: int | None, **columns: Any) -> dict[str, Any]:
    part = hand_made_pass(**columns)
    found = semantic_milestones(part, CONFIG, d_vocab=D_VOCAB)
    return semantic_fields(part, found, CONFIG, d_vocab=D_VOCAB, confirmed=confirmed)


def test_fields_at_the_onset() -> None:
    values = fields(
        2,
        answer_rank=[9, 1, 1],
        p_answer=[0.1, 0.0015, 0.7],
        answer_logit_gap=[None, 0.2, 3.0],
    )
    margin, gate = values["semantic_margin"], values["semantic_gate"]
    assert margin["p_uniform"] == 1 / D_VOCAB
    assert margin["margin_ok_at_L_semantic_norm"] is False
    assert margin["p_answer_at_L_semantic_norm"] == 0.0015
    assert margin["L_semantic_confirmed_margin_ok_norm"] == 2
    assert gate["gap_at_L_semantic_norm"] == 0.2
    assert gate["L_semantic_top2_ok_norm"] == gate["L_semantic_strong"] == 2
    assert gate["L_semantic_top2_ok_norm_frac"] == 1.0
    assert values["answer_margin_thresholds"] == {"gap_ge_0.5": 2, "gap_ge_1.0": 2}
    assert values["cos_milestones"] == {"norm": {"ge_0.2": None, "ge_0.4": None, "ge_0.6": None}}


def test_margin_at_the_onset_is_inclusive() -> None:
    exact = 0.002 + 1 / D_VOCAB
    values = fields(None, answer_rank=[9, 1], p_answer=[0.1, exact])
    assert values["semantic_margin"]["margin_ok_at_L_semantic_norm"] is True


def test_confirmed_with_margin_only_where_both_are_the_same_layer() -> None:
    values = fields(1, answer_rank=[9, 1, 1], p_answer=[0.1, 0.0015, 0.7])
    assert values["semantic_margin"]["L_semantic_confirmed_margin_ok_norm"] is None


def test_fields_without_an_onset() -> None:
    values = fields(None, answer_rank=[9, 9], p_answer=[0.1, 0.1])
    assert values["L_semantic"] is None
    assert values["semantic_margin"]["margin_ok_at_L_semantic_norm"] is None
    assert values["semantic_margin"]["L_semantic_confirmed_margin_ok_norm"] is None
    assert values["semantic_gate"]["run2_overlaps_confirmed_window"] is None


def test_fractions() -> None:
    part = hand_made_pass(answer_rank=[9, 5, 1, 1], n_layers=3)
    found = semantic_milestones(part, CONFIG, d_vocab=D_VOCAB)
    shares = semantic_fractions(found, n_layers=3)
    assert (shares["L_semantic_frac"], shares["first_rank_le_5_frac"]) == (0.667, 0.333)
    assert shares["L_semantic_strong_frac"] is None


@pytest.mark.parametrize(
    ("run2", "confirmed", "overlap"),
    [
        (7, 10, True),  # row 8 is the window's first
        (6, 10, False),
        (12, 10, True),
        (13, 10, False),
        (None, 10, None),
        (7, None, None),
    ],
)
def test_run_against_window(run2: int | None, confirmed: int | None, overlap: bool | None) -> None:
    assert run_overlaps_window(run2, confirmed, window=2) is overlap


def confirm(norm: list[int | None], **others: list[int | None]) -> dict[str, Any]:
    return confirmed_semantics(
        hand_made_pass(answer_rank=norm),
        {lens: hand_made_pass(lens, answer_rank=ranks) for lens, ranks in others.items()},
        CONFIG,
    )


def test_confirmed_within_two_rows() -> None:
    norm = [9, 9, 9, 1, 1, 1]
    result = confirm(norm, raw=[9, 1, 9, 9, 9, 9])
    assert (result["L_semantic_confirmed"], result["confirmed_source"]) == (3, "raw")
    assert result["L_semantic_raw"] == 1
    assert confirm(norm, raw=[1, 9, 9, 9, 9, 9])["L_semantic_confirmed"] is None
    assert confirm(norm, raw=[9, 9, 9, 9, 9, 1])["L_semantic_confirmed"] == 3


def test_confirmed_sources() -> None:
    norm, yes, no = [9, 1], [9, 1], [9, 9]
    assert confirm(norm, raw=yes, tuned=yes)["confirmed_source"] == "both"
    assert confirm(norm, raw=no, tuned=yes)["confirmed_source"] == "tuned"
    assert confirm(norm, raw=no, tuned=no)["confirmed_source"] == "none"
    assert confirm(norm, prism=yes) == {
        "L_semantic_norm": 1,
        "L_semantic_raw": None,
        "L_semantic_tuned": None,
        "Δ_window": 2,
        "L_semantic_confirmed": None,
        "confirmed_source": "none",
        "lenses_available": [],
    }


def test_nothing_to_confirm() -> None:
    result = confirm([9, 9], raw=[1, 1])
    assert (result["L_semantic_norm"], result["L_semantic_confirmed"]) == (None, None)
    assert (result["L_semantic_raw"], result["confirmed_source"]) == (0, "none")
