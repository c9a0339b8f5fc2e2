"""Medians, intervals and differences of depth, by hand; what is refused stays out of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from layerscope.errors import TableError
from layerscope.measures.cross_model import compare
from layerscope.measures.paired_medians import difference_of, draws, median_of
from layerscope.measures.readings import KINDS, read_layers, with_labels
from layerscope.measures.runs_described import changed
from layerscope.measures.summary import summarise
from support.readings import reading, with_fact, with_lenses
from support.tables import synthetic_table


def test_medians_and_paired_differences_by_hand() -> None:
    # Depths 1/4, 2/4, 3/4 against 4/8, 5/8, 7/8: per fact +0.25, +0.125, +0.125.
    found = compare([reading("a", [1, 2, 3]), reading("b", [4, 5, 7], n_layers=8)])
    onset = found.by_lens["norm"]["L_semantic"]
    assert onset.facts == ("A", "B", "C")
    assert [entry.median for entry in onset.runs] == [0.5, 0.625]
    assert [(entry.low, entry.high) for entry in onset.runs] == [(0.25, 0.75), (0.5, 0.875)]
    gap = onset.differences[1]
    assert onset.differences[0] is None and gap is not None
    assert (gap.base, gap.n, gap.median, gap.row) == (0, 3, 0.125, 0.25)
    assert (gap.low, gap.high) == (0.125, 0.25)
    assert not gap.resolved, "smaller than a row of the coarser model"


def test_a_difference_of_a_row_in_every_fact_is_told_apart() -> None:
    found = compare([reading("a", [1, 1, 1]), reading("b", [3, 3, 2])])
    gap = found.by_lens["norm"]["L_semantic"].differences[1]
    assert gap is not None and gap.resolved and gap.median == 0.5


def test_never_is_counted_and_left_out() -> None:
    found = compare([reading("a", [1, None, None]), reading("b", [2, 4, 4])])
    first = found.by_lens["norm"]["L_semantic"].runs[0]
    assert (first.n, first.found, first.median, first.with_never) == (3, 1, 0.25, None)
    gap = found.by_lens["norm"]["L_semantic"].differences[1]
    assert gap is not None and (gap.n, gap.median) == (1, 0.25)
    second = found.by_lens["norm"]["L_semantic"].runs[1]
    assert second.with_never == second.median == 1.0


def test_a_refused_fact_leaves_the_medians_of_all_runs() -> None:
    b = with_fact(reading("b", [1, 1, 4]), "C", first_piece=" Ca", n_pieces=2)
    found = compare([reading("a", [1, 1, 4]), b, reading("c", [2, 2, 4])])
    onset = found.by_lens["norm"]["L_semantic"]
    assert onset.facts == ("A", "B")
    assert [entry.median for entry in onset.runs] == [0.25, 0.25, 0.5]
    assert found.cell(1, "C", "L_semantic").refused is not None
    assert found.cell(0, "C", "L_semantic").refused is None
    assert found.cell(1, "C", "L_semantic").depth == 1.0, "shown, in grey"


def test_a_refused_run_does_not_empty_the_others() -> None:
    c = replace(reading("c", [4, 4]), norm_choice="next_norm")
    found = compare([reading("a", [1, 2]), reading("b", [1, 2]), c])
    onset = found.by_lens["norm"]["L_semantic"]
    assert onset.facts == ("A", "B")
    assert "next_norm" in str(onset.runs[2].refused) and onset.runs[2].median == 1.0
    assert onset.differences[2] is None
    assert found.by_lens["raw"]["L_semantic"].runs[2].refused is None, "raw uses no norm"


def test_high_tier_leaves_ranks_and_thresholds() -> None:
    b = with_lenses(reading("b", [2, 2]), "norm", tier="high")
    found = compare([reading("a", [1, 2]), b]).by_lens["norm"]
    compared = {name for name, entry in found.items() if entry.facts}
    assert compared == {name for name, kind in KINDS.items() if kind != "probability"}


def test_two_runs_that_differ_leave_nothing() -> None:
    b = replace(reading("b", [1, 1]), norm_choice="next_norm")
    found = compare([reading("a", [1, 2]), b])
    entry = found.by_lens["norm"]["L_semantic"]
    assert entry.facts == () and all(one.refused for one in entry.runs)
    assert entry.runs[0].refused == "no other run may be compared with it"


def test_probabilities_are_for_one_model() -> None:
    a = reading("a", [1, 2])
    again = replace(a, label="again", config={"top_k": 5})
    for entry in compare([a, again]).absolute:
        assert entry.refused is None
    other = compare([a, replace(reading("b", [1, 2]), tokenizer="another")])
    for entry in other.absolute:
        assert "different models with different tokenizers" in str(entry.refused)
    assert other.absolute[0].values == (0.5, 0.5)
    half = {entry.name: entry.values for entry in other.absolute}
    assert half["KL to final at half the depth, norm lens (bits)"] == (2.0, 2.0)
    unknown = [replace(entry, weights=None) for entry in (a, again)]
    assert "not recorded" in str(compare(unknown).absolute[0].refused)


def test_what_changed_between_runs_of_one_model() -> None:
    a = replace(reading("a", [1]), config={"lens": ["norm"], "measures": {"gap": 0.5, "k": 1}})
    b = replace(a, config={"lens": ["norm"], "measures": {"gap": 1.0, "k": 1}}, dtype="float16")
    (change,) = changed([a, reading("other", [1]), b])
    assert change.runs == (0, 2)
    assert change.options == (("dtype", ("float32", "float16")), ("measures.gap", (0.5, 1.0)))


def test_groups_of_a_battery() -> None:
    def grouped(name: str, rows: list[int]) -> object:
        run = reading(name, rows)
        return with_fact(with_fact(run, "A", group="capital/en"), "B", group="currency/en")

    found = compare([grouped("a", [1, 4]), grouped("b", [2, 4])])  # type: ignore[list-item]
    assert found.groups["capital/en"].facts == ("A",)
    assert found.groups["capital/en"].runs[1].median == 0.5


def test_the_bootstrap_is_that_of_the_median() -> None:
    values = np.array([0.1, 0.2, 0.4, 0.8, np.nan])
    drawn = draws("x", 5, seed=3, resamples=400)
    expected = [np.nanmedian(values[row]) for row in drawn if not np.isnan(values[row]).all()]
    found = median_of(values, drawn)
    assert found.median == pytest.approx(0.3)
    assert found.low == pytest.approx(np.percentile(expected, 2.5))
    assert found.high == pytest.approx(np.percentile(expected, 97.5))
    assert found.with_never == pytest.approx(0.4)
    assert (draws("x", 5, seed=3, resamples=400) == drawn).all()
    assert (draws("y", 5, seed=3, resamples=400) != drawn).any()


def test_a_difference_that_may_be_zero_is_not_resolved() -> None:
    drawn = draws("x", 4, seed=0, resamples=500)
    found = difference_of(np.array([0.5, -0.5, 0.5, 0.5]), drawn, base=0, row=0.1)
    assert found.median == 0.5 and not found.resolved


def test_bad_input() -> None:
    with pytest.raises(TableError, match="two runs"):
        compare([reading("a", [1])])
    with pytest.raises(TableError, match="no run has a tuned lens; there are norm, raw"):
        compare([reading("a", [1]), reading("b", [1])], lens="tuned")


def test_a_layers_run_is_read_with_its_own_milestones() -> None:
    table = synthetic_table(n_layers=6, n_facts=3)
    summary = summarise(table).to_dict()
    read = read_layers(table, summary, {"model": {"dtype": "float32"}}, run="x")
    assert list(read.facts) == [
        entry["fact_key"]
        for entry in summary["passes"]
        if entry["lens"] == "norm"
        and (entry["prompt_id"], entry["prompt_variant"]) == ("pos", "orig")
    ]
    for entry in summary["passes"]:
        if entry["lens"] == "norm" and entry["prompt_variant"] == "orig" and entry["fact_key"]:
            if entry["prompt_id"] == "ctl":
                continue
            fact = read.facts[entry["fact_key"]].lenses["norm"]
            assert fact.milestones["L_semantic"] == entry["L_semantic"]
            assert fact.milestones["L_semantic_confirmed"] == entry["L_semantic_confirmed"]
            assert len(fact.ranks) == 7
    again = replace(read, run="y")
    labels = [entry.label for entry in with_labels([read, again])]
    assert labels == ["synthetic (x)", "synthetic (y)"]
    json.dumps(compare(with_labels([read, again])).to_dict(), allow_nan=False)


def test_labels_keep_only_what_differs_of_a_path() -> None:
    base = reading("m", [1])
    places = ("out/a/run-latest/t.parquet", "out/b/run-latest/t.parquet")
    labelled = with_labels([replace(base, run=place) for place in places])
    assert [entry.label for entry in labelled] == ["m (a)", "m (b)"]
