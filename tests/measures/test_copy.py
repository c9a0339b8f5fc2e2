from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig
from layerscope.measures.copy import (
    CopyFlags,
    Flag,
    copy_summary,
    entropy_collapse,
    flag_columns,
    in_prompt,
    margin_exceeds,
    norm_only_flag,
    stability_tag,
    with_copy_flags,
)
from layerscope.measures.table import LayersTable
from support.hand_made import hand_made_pass, hand_made_table, one_pass
from support.tables import synthetic_table

CONFIG = MeasureConfig()
PROMPT = {"prompt_ids": (10, 11, 12, 13)}


def strict(**values: Any) -> list[bool]:
    part = hand_made_pass(prompt=values.pop("prompt", PROMPT), **values)
    return CopyFlags(part, values.pop("config", CONFIG)).strict(0.95).true.tolist()


def test_strict_needs_probability_above_the_threshold() -> None:
    assert strict(top1=[10, 10, 10], p1=[0.95, 0.951, 0.94], p2=[0.01] * 3) == [False, True, False]


def test_strict_needs_margin_above_the_threshold() -> None:
    config = MeasureConfig(copy_threshold=0.5, copy_margin=0.25)
    part = hand_made_pass(top1=[10, 10], p1=[0.625, 0.625], p2=[0.375, 0.374], prompt=PROMPT)
    assert CopyFlags(part, config).strict(0.5).true.tolist() == [False, True]


def test_strict_needs_a_prompt_token() -> None:
    assert strict(top1=[10, 99, None], p1=[0.99] * 3, p2=[0.0] * 3) == [True, False, False]


def test_strict_ignores_white_space_and_punctuation() -> None:
    values = {"top1": [10] * 3, "p1": [0.99] * 3, "p2": [0.0] * 3}
    assert strict(**values, top1_ignorable=[True, False, None]) == [False, True, True]


def test_soft_has_neither_margin_nor_guard() -> None:
    part = hand_made_pass(
        top1=[10, 10], p1=[0.51, 0.50], p2=[0.49, 0.5], top1_ignorable=[True] * 2, prompt=PROMPT
    )
    assert CopyFlags(part, CONFIG).soft(1, 0.5).true.tolist() == [True, False]


def test_windows_run_over_layers() -> None:
    top1 = [10, 11, 12, 11, 12, 99, 13]
    part = hand_made_pass(top1=top1, p1=[0.9] * 7, p2=[0.0] * 7, prompt=PROMPT)
    flags = CopyFlags(part, CONFIG)
    assert flags.soft(1, 0.5).true.tolist() == [True] * 5 + [False, True]
    assert flags.soft(2, 0.5).true.tolist() == [False, True, True, False, True, False, False]
    assert flags.soft(3, 0.5).true.tolist() == [False, False, True, False, False, False, False]


def test_only_the_newest_layer_must_be_confident() -> None:
    part = hand_made_pass(top1=[10, 11], p1=[0.1, 0.9], p2=[0.0] * 2, prompt=PROMPT)
    assert CopyFlags(part, CONFIG).soft(2, 0.5).true.tolist() == [False, True]


def test_a_window_longer_than_the_prompt_never_matches() -> None:
    assert not in_prompt([10, 11, 12], (10, 11), k=3).any()


def test_an_empty_prompt_never_matches() -> None:
    assert strict(top1=[10, None], p1=[0.99] * 2, p2=[0.0] * 2, prompt={}) == [False, False]
    assert not in_prompt([None], (), k=1).any()


def test_windows_start_anew_with_every_pass_and_lens() -> None:
    # The last layer of one pass and the first of the next would match as a pair.
    tops = {"top_ids": [[99], [10]], "top_probs": [[0.9, 0.0]] * 2}
    first = hand_made_table({"raw": tops, "norm": tops}, prompt=PROMPT)
    second = hand_made_table(
        {"raw": {"top_ids": [[11], [12]], "top_probs": [[0.9, 0.0]] * 2}},
        prompt=PROMPT | {"prompt_index": 1},
    )
    both = LayersTable(
        rows=pl.concat([first.rows, second.rows]),
        meta=first.meta.__class__(
            **{**first.meta.__dict__, "prompts": (*first.meta.prompts, *second.meta.prompts)}
        ),
    )
    flags = with_copy_flags(both).rows.sort("prompt_index", "lens", "layer")
    assert flags["copy_soft_k1@0.5"].to_list() == [False, True, False, True, True, True]
    assert flags["copy_soft_k2@0.5"].to_list() == [False] * 5 + [True]


def test_unknown_runner_up_counts_as_large_as_it_can_be() -> None:
    p1, unknown = np.array([0.56, 0.54]), np.array([np.nan, np.nan])
    assert margin_exceeds(p1, unknown, 0.1).tolist() == [True, False]


def test_entropy_collapse_is_inclusive() -> None:
    part = hand_made_pass(entropy_bits=[1.01, 1.0, None])
    assert entropy_collapse(part, CONFIG).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("low", "high", "n_layers", "tag"),
    [
        (None, None, 32, "none"),
        (0, 0, 42, "stable"),
        (3, 5, 32, "stable"),
        (3, 6, 32, "mixed"),
        (3, 6, 60, "stable"),  # 3 rows are 5% of 60
        (3, 9, 100, "fragile"),
        (3, 8, 100, "stable"),
        (1, 4, 20, "fragile"),  # 15% of the depth
        (1, None, 32, "mixed"),
    ],
)
def test_stability(low: int | None, high: int | None, n_layers: int, tag: str) -> None:
    layers = {0.7: low, 0.8: None, 0.95: high}
    if low is None and high is None:
        assert stability_tag({0.7: None, 0.95: None}, n_layers=n_layers) == tag
    else:
        assert stability_tag(layers, n_layers=n_layers) == tag


def _flag(*values: bool | None) -> Flag:
    return Flag(
        true=np.array([value is True for value in values]),
        known=np.array([value is not None for value in values]),
    )


def test_norm_only_flag() -> None:
    raw = hand_made_pass("raw", answer_rank=[5, 5, 5, 5])
    assert norm_only_flag(None, raw, _flag(False, False, False, False), radius=1) is None
    assert norm_only_flag(1, None, None, radius=1) is None
    assert norm_only_flag(0, raw, _flag(False, False, False, True), radius=2) is True
    assert norm_only_flag(0, raw, _flag(False, False, True, True), radius=2) is False
    assert norm_only_flag(0, raw, _flag(False, None, False, True), radius=2) is None
    assert norm_only_flag(0, raw, _flag(True, None, False, True), radius=2) is False


def test_summary_fields() -> None:
    part = hand_made_pass(
        top1=[10, 10, 11, 99, 99],
        p1=[0.72, 0.97, 0.6, 0.9, 0.9],
        p2=[0.0] * 5,
        entropy_bits=[3.0, 0.5, 2.0, 0.9, 0.9],
        prompt=PROMPT,
    )
    fields, found = copy_summary(part, CONFIG, radius=4, semantic=4)
    assert (fields["L_copy"], fields["L_copy_H"], fields["delta_layers"]) == (1, 1, 3)
    assert fields["L_copy_soft"] == {"1": 0, "2": 2, "3": None}
    assert fields["delta_layers_soft"] == {"1": 4, "2": 2, "3": None}
    sweep = fields["copy_thresholds"]
    assert sweep["L_copy_strict"] == {"0.7": 0, "0.8": 1, "0.9": 1, "0.95": 1}
    assert sweep["L_copy_strict_frac"]["0.8"] == 0.25
    assert sweep["norm_only_flags"] == dict.fromkeys(("0.7", "0.8", "0.9", "0.95"))
    assert sweep["stability"] == "stable"
    assert (found["L_copy"].stable, found["L_copy"].lost) == (None, (2,))
    assert fields["copy_detector"]["soft"]["L_copy_soft"] == {"k1": 0, "k2": 2, "k3": None}


def test_columns_have_the_published_names_and_order() -> None:
    assert flag_columns(CONFIG) == [
        "copy_strict@0.95",
        "copy_strict@0.7",
        "copy_strict@0.8",
        "copy_strict@0.9",
        "copy_soft_k1@0.5",
        "copy_soft_k2@0.5",
        "copy_soft_k3@0.5",
    ]
    more = MeasureConfig(copy_soft_extra_thresholds=(0.33, 0.2), copy_soft_window_ks=(2, 1))
    assert flag_columns(more)[-4:] == [
        "copy_soft_k1@0.2",
        "copy_soft_k2@0.2",
        "copy_soft_k1@0.33",
        "copy_soft_k2@0.33",
    ]


def test_with_copy_flags_on_a_whole_table() -> None:
    table = synthetic_table()
    flagged = with_copy_flags(table)
    assert flagged.rows.drop("copy_collapse", *flag_columns(CONFIG)).equals(table.rows)
    last = flagged.rows["is_last"]
    collapse = flagged.rows["copy_collapse"]
    assert collapse.filter(~last).null_count() == (~last).sum()
    assert collapse.filter(last).null_count() == 0
    assert collapse.filter(last).any()
    assert with_copy_flags(flagged).rows.equals(flagged.rows)


def _published(**columns: list[Any]) -> LayersTable:
    table = hand_made_table(
        {"norm": {"top_ids": [[None]] * 2, "top_probs": [[0.97, 0.01], [0.8, 0.1]]}}
    )
    rows = table.rows.with_columns(pl.Series(name, cells) for name, cells in columns.items())
    return LayersTable(rows=rows, meta=table.meta)


def test_published_flags_are_used_where_ids_are_missing() -> None:
    columns = {"copy_strict@0.7": [True, True], "copy_strict@0.95": [True, False]}
    part = one_pass(_published(**columns))
    flags = CopyFlags(part, CONFIG)
    assert flags.strict(0.95).true.tolist() == [True, False]
    assert flags.strict(0.75).true.tolist() == [True, True]  # 0.7 flags with p1 > 0.75
    assert flags.strict(0.9).true.tolist() == [True, False]


def test_published_flags_cannot_be_loosened() -> None:
    table = _published(**{"copy_strict@0.7": [True, True]})
    with pytest.raises(TableError, match="cannot be recomputed"):
        CopyFlags(one_pass(table), CONFIG).strict(0.6)
    loose = MeasureConfig(copy_margin=0.05)
    with pytest.raises(TableError, match=r"margin 0\.1"):
        CopyFlags(one_pass(table), loose).strict(0.7)
    soft = one_pass(_published(**{"copy_strict@0.7": [True] * 2, "copy_soft_k1@0.5": [True] * 2}))
    assert CopyFlags(soft, loose).soft(1, 0.9).true.tolist() == [True, False]
    with pytest.raises(TableError, match="window lengths"):
        CopyFlags(soft, CONFIG).soft(2, 0.5)
    tight = MeasureConfig(copy_margin=0.8)
    assert CopyFlags(one_pass(table), tight).strict(0.7).true.tolist() == [True, False]


def test_a_flag_that_is_not_known_stays_unknown() -> None:
    part = one_pass(_published(**{"copy_strict@0.95": [None, False]}))
    flag = CopyFlags(part, CONFIG).strict(0.95)
    assert (flag.true.tolist(), flag.known.tolist()) == ([False, False], [False, True])
