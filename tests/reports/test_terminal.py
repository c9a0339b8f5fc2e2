"""The terminal summary: fits its width, shows tokens verbatim, stays short."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from layerscope.measures.table import LayersTable
from layerscope.reports.terminal import print_summary, sampled
from support.compared_lenses import compared_summary as lens_summary
from support.compared_lenses import compared_table as lens_table
from support.summaries import many_passes, small_summary, with_tokens
from support.tables import synthetic_table


def printed(
    summary: dict[str, Any], table: LayersTable | None, *, width: int = 80, color: bool = False
) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=color, color_system="standard" if color else None
    )
    print_summary(summary, table, console)
    return out.getvalue()


@pytest.fixture(scope="module")
def table() -> LayersTable:
    return synthetic_table(n_layers=8, n_facts=2)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(table: LayersTable, width: int) -> None:
    wide = with_tokens(table, [" 東京東京東京東京東京東京", "averylongtokenindeed" * 4, "[/]"])
    for entry in (table, wide):
        text = printed(small_summary(entry), entry, width=width)
        assert max(cell_len(line) for line in text.splitlines()) <= width


def test_it_says_verdict_facts_layers_and_reasons(table: LayersTable) -> None:
    text = printed(small_summary(table), table)
    assert "“Berlin” becomes the top prediction at layer" in text
    assert "trust: medium" in text
    assert "Germany→Berlin" in text
    assert "norm: top-1" in text
    assert "raw: top-1" in text
    assert "→ Confirm the onset with a second lens before citing it." in text
    lines = text[text.index("norm: top-1") :].splitlines()[1:10]
    assert [line.split()[0] for line in lines] == [str(layer) for layer in range(8, -1, -1)]


def test_a_wide_terminal_shows_milestones_beside_their_layers(table: LayersTable) -> None:
    text = printed(small_summary(table), table, width=120)
    lines = text[text.index("norm: top-1") :].splitlines()[1:10]
    passes = small_summary(table)["passes"]
    norm = next(entry for entry in passes if entry["lens"] == "norm")
    first = norm["milestones"]["L_semantic"]["first"]
    assert "top-1" in lines[8 - first]


def test_markup_in_tokens_is_text(table: LayersTable) -> None:
    marked = with_tokens(table, ["[red]x[/red]", "[/]", "[link=file:///etc]y"])
    text = printed(small_summary(marked), marked, width=200, color=True)
    assert "[red]x[/red]" in text
    assert "\x1b[31m" not in text
    assert "[/]" in printed(small_summary(marked), marked, width=200)


def test_escape_sequences_in_tokens_do_not_reach_the_terminal(table: LayersTable) -> None:
    evil = with_tokens(table, ["\x1b[31mred", "\x07", "a\rb"])
    text = printed(small_summary(evil), evil)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\r" not in text


def test_a_summary_alone_is_enough(table: LayersTable) -> None:
    text = printed(small_summary(table), None)
    assert "The answer becomes the top prediction at layer" in text
    assert "France→Paris" in text
    assert "norm: top-1" not in text


def test_an_empty_summary_is_said_to_be_empty() -> None:
    text = printed({"model": "m", "n_layers": 4, "d_vocab": 10, "passes": []}, None)
    assert "No prompt was measured." in text


def test_many_facts_are_cut_and_counted() -> None:
    many = many_passes(synthetic_table(n_layers=4, n_facts=1), 50)
    assert "… and 30 more facts" in printed(small_summary(many), many)


def test_deep_models_are_sampled_with_ends_and_milestones() -> None:
    layers = list(range(81))
    kept = sampled(layers, keep={37, 41})
    assert {0, 80, 37, 41} <= set(kept)
    assert len(kept) <= 25
    assert sampled(list(range(9)), keep=set()) == list(range(9))


def test_fitted_lenses_stand_beside_the_others() -> None:
    entry = lens_table()
    text = printed(lens_summary(), entry)
    assert "Lens against lens" in text
    rows = text[text.index("Lens against lens") :].splitlines()[2:8]
    assert [row.split()[0] for row in rows] == ["norm", "norm", "raw", "bias", "tuned", "prism"]
    assert "Report the tuned lens" in text
    assert max(cell_len(line) for line in text.splitlines()) <= 80


def test_two_lenses_are_not_compared_twice(table: LayersTable) -> None:
    assert "Lens against lens" not in printed(small_summary(table), table)
