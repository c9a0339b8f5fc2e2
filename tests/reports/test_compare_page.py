"""The page of a comparison: everything escaped, refused cells grey with their reason."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from layerscope.measures.cross_model import CrossModel, compare
from layerscope.reports.compare import write_compare
from layerscope.reports.compare_text import verdict
from support.readings import fact_reading, lens_reading, reading

EVIL = '"><script>alert(1)</script>{{ 7 * 7 }}\u202e'


def compared() -> CrossModel:
    """Compare two runs and one under another norm, everything named as badly as possible."""
    lenses = {"norm": lens_reading(2), "raw": lens_reading(3)}
    facts = {EVIL: fact_reading(EVIL, lenses, answer=EVIL, text=EVIL, first_piece=EVIL)}
    guidance = {
        "trust": "low",
        "preferred_lens_for_reporting": EVIL,
        "reasons": [{"code": EVIL, "severity": "high", "message": EVIL}],
    }
    base = reading(EVIL, [], facts=facts, guidance=guidance, run=EVIL, config={EVIL: EVIL})
    other = replace(base, label=f"{EVIL} again", config={EVIL: f"{EVIL}!"}, run="2")
    third = replace(base, label="third", norm_choice="next_norm", run="3", weights="others")
    return compare([base, other, third])


def page(tmp_path: Path) -> str:
    return write_compare(compared(), tmp_path / "page.html").read_text("utf-8")


def test_nothing_a_run_says_becomes_markup(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "<script>alert" not in text
    assert text.count("<script") == 1
    assert "\u202e" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#)', text), "nothing is loaded from outside"


def test_refused_cells_are_grey_reachable_by_key_and_say_why(tmp_path: Path) -> None:
    cells = re.findall(r"<td [^>]*greyed[^>]*>.*?</td>", page(tmp_path), re.DOTALL)
    assert cells
    for cell in cells:
        assert 'tabindex="0"' in cell and "(not compared: " in cell and 'data-tip="' in cell
    assert any("decoded with the next_norm norm" in cell for cell in cells)


def test_what_changed_stands_first_where_a_model_was_run_twice(tmp_path: Path) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page(tmp_path))
    assert headings[:2] == ["What changed", "Runs"]
    assert "What may not be compared" in headings
    different = compare([reading("a", [1]), reading("b", [1])])
    text = write_compare(different, tmp_path / "two.html").read_text("utf-8")
    assert "What changed" not in text
    assert "Nothing is refused." in text


def test_the_verdict_says_what_may_be_said() -> None:
    apart = compare([reading("a", [1, 1, None]), reading("b", [3, 3, 3])])
    assert verdict(apart) == (
        "Onset of the answer, median of 3 facts: 0.25 of the depth in a (2 of 3 facts), 0.75 of "
        "the depth in b. b is 0.50 of the depth later than a."
    )
    close = compare([reading("a", [1, 2, 3]), reading("b", [2, 2, 2])])
    assert "b cannot be told from a: one row is up to 0.25 of the depth" in verdict(close)
    b = replace(reading("b", [1]), norm_choice="next_norm")
    nothing = verdict(compare([reading("a", [1]), b]))
    assert nothing.startswith("Onsets may not be compared. a: no other run may be compared")
    assert "b: decoded with the next_norm norm" in nothing


def test_a_run_has_one_colour_in_all_figures(tmp_path: Path) -> None:
    runs = [
        replace(reading("first", [1]), dtype="bfloat16"),
        reading("second", [1]),
        reading("third", [2]),
    ]
    text = write_compare(compare(runs), tmp_path / "page.html").read_text("utf-8")
    keys = re.findall(r'<p class="key">(.*?)</p>', text)
    assert len(keys) == 2
    for key in keys:
        assert '<i class="s1"></i>second' in key and '<i class="s2"></i>third' in key
    assert '<i class="s0"></i>first<' in keys[0]
    assert '<i class="s0"></i>first: not compared<' in keys[1]
