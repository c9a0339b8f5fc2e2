"""The page kit: everything escaped, nothing from outside, null and odd values drawn honestly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from layerscope.errors import OutputError
from layerscope.reports.page import (
    Bars,
    Figures,
    HeatMap,
    Lines,
    Multiples,
    Reasons,
    Section,
    Table,
    Text,
    Widget,
    render_page,
    write_page,
)

EVIL = '"><script>alert(1)</script>{{ 7 * 7 }}'


def every_part() -> list[Section]:
    heat = HeatMap(
        [[0.0, -2.0], [None, float("nan")]],
        [EVIL, "b"],
        ["x", EVIL],
        caption=EVIL,
        unit=EVIL,
        diverging=True,
        hover=[[EVIL] * 2] * 2,
        row_title=EVIL,
        column_title=EVIL,
    )
    parts = [
        Text([EVIL]),
        Figures([(EVIL, 0.25, EVIL), (EVIL, None, "")]),
        Reasons([{"severity": "high", "message": EVIL, "action": EVIL}]),
        Table([EVIL, "n"], [[EVIL, 1], [None, 2.5]], caption=EVIL),
        heat,
        Lines({EVIL: [(0, 1.0), (1, None), (2, 3.0)]}, EVIL, EVIL, EVIL, bands={EVIL: [(0, 0, 1)]}),
        Multiples([Bars([EVIL, "c"], [1.0, None], EVIL, unit=EVIL, errors=[(0.5, 1.5), None])]),
        Widget("data", {"text": EVIL}, "void 0;"),
    ]
    return [Section(EVIL, parts, lead=EVIL)]


def test_nothing_a_model_says_becomes_markup() -> None:
    page = render_page(
        title=EVIL, kicker=EVIL, verdict=EVIL, sections=every_part(), provenance={"prompt": EVIL}
    )
    assert "<script>alert" not in page
    assert "{{ 7 * 7 }}" in page
    assert page.count("<script") == 3  # a widget's data and code, and ours
    assert not re.findall(r'(?:src|href)="(?!#)', page)


def test_a_value_that_is_not_finite_is_drawn_as_absent() -> None:
    page = render_page(title="t", sections=every_part())
    assert page.count('class="absent"') == 2
    assert "no value" in page


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[3.0, 3.0]], [[None, None]]])
@pytest.mark.parametrize("diverging", [True, False])
def test_heat_maps_of_one_value_or_none(values: list[list[float | None]], diverging: bool) -> None:
    drawn = HeatMap(values, ["r"], ["a", "b"], "c", diverging=diverging).draw()
    assert "nan" not in drawn
    assert drawn.count("<rect") == 2


def test_colours_follow_size_and_sign() -> None:
    drawn = HeatMap([[4.0, -2.0, 1.0]], ["r"], ["a", "b", "c"], "", diverging=True).draw()
    found = re.findall(r'class="(pos|neg)" fill-opacity="([\d.]+)"', drawn)
    assert found == [("pos", "1.000"), ("neg", "0.500"), ("pos", "0.250")]


def test_lines_break_where_a_value_is_missing() -> None:
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 4.0), (4, 5.0)]
    drawn = Lines({"s": points}, "x", "y", "").draw()
    assert drawn.count('class="line') == 2
    assert drawn.count("<circle") == 4


def test_a_page_without_sections_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nothing to report"):
        write_page(tmp_path / "page.html", title="t", sections=[])
    assert not list(tmp_path.iterdir())
