"""Lens against lens, in words and rows."""

from __future__ import annotations

from typing import Any

import pytest

from layerscope.reports.html import layers_page
from layerscope.reports.lenses import lens_notes, lens_table
from layerscope.reports.text import number
from support.compared_lenses import compared_summary as summary
from support.compared_lenses import compared_table as table

HELD_OUT = {"norm": [9.0] * 7, "tuned": [1.0] * 7, "temperature": [5.0] * 7, "bias": [4.0] * 7}


def test_one_row_per_lens_and_the_tempered_norm_lens_beside_it() -> None:
    found = lens_table(summary())
    assert [row.name for row in found.rows] == ["norm", "norm / τ", "raw", "bias", "tuned", "prism"]
    assert found.depths == ("25% (layer 2)", "50% (layer 3)", "75% (layer 4)")
    bits = {row.name: row.bits for row in found.rows}
    assert bits["tuned"] == ("3.00", "3.00", "3.00")
    assert bits["norm / τ"] == ("7.00", "7.00", "7.00")
    tempered = next(row for row in found.rows if row.name == "norm / τ")
    assert {text for text, _ in tempered.milestones} == {"–"}


def test_missing_milestones_are_counted_in_the_cell() -> None:
    entry: dict[str, Any] = summary()
    entry["lens_comparison"]["milestones"]["prism"]["L_semantic"] = {"median": 4.5, "missing": 1}
    prism = next(row for row in lens_table(entry).rows if row.name == "prism")
    assert f"{number(4.5)} (2/3)" in [text for text, _ in prism.milestones]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "Report the tuned lens: in 3 of 3 facts"),
        ({}, "6.00 bits nearer to the model than the norm lens (median of 3 facts)"),
        ({}, "one temperature per layer alone +2.00, a bias alone +3.00, beyond both +3.00"),
        ({}, "fitted on 1 prompt of this run"),
        ({}, "Without the jacobian lens: no folder."),
        ({"tuned": 9.0}, "1.00 bits farther from the model"),
        ({"held_out": HELD_OUT}, "On text held out by its fit (10 positions"),
        ({"warnings": ("worse than norm",)}, "tuned: its fit warns: worse than norm."),
    ],
)
def test_what_the_comparison_says(options: dict[str, Any], says: str) -> None:
    assert any(says in note for note in lens_notes(summary(**options))), lens_notes(
        summary(**options)
    )


def test_a_summary_without_a_comparison_has_no_rows() -> None:
    assert lens_table({}).rows == () and lens_notes({}) == []


def test_the_page_shows_the_comparison_escaped_and_every_lens_in_the_figures() -> None:
    entry = summary(warnings=("<b>bad</b>",))
    page = layers_page((table(warnings=("<b>bad</b>",)), entry, {}))
    assert "Lens against lens" in page and "norm / τ" in page
    assert "&lt;b&gt;bad&lt;/b&gt;" in page and "<b>bad</b>" not in page
    assert '"lenses":["norm","raw","bias","tuned","prism"]' in page.replace(", ", ",")
