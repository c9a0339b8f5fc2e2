"""The checks of a run, as rows and as one line."""

from __future__ import annotations

from typing import Any

import pytest

from layerscope.reports.checks import checks, checks_line
from layerscope.reports.html import layers_page
from layerscope.reports.verdict import reasons
from support.summaries import small_summary
from support.tables import synthetic_table

SECTIONS: dict[str, Any] = {
    "skipped_one": {"status": "skipped", "reason": "<i>no</i> tuned lens"},
    "repeatability": {"status": "ok", "gates": {"same.batch": True}, "warnings": []},
    "decoding_point": {
        "status": "ok",
        "gates": {"consistent": False, "other": True},
        "warnings": ["norms differ at row 4"],
    },
    "position_window": {"status": "ok", "gates": {"stable": None}, "warnings": ["one position"]},
    "layer_map": {"status": "ok", "rows": []},
}


def test_failed_checks_come_first_and_skipped_ones_last_with_their_reason() -> None:
    found = checks({"diagnostics": SECTIONS})
    assert [check.verdict for check in found] == [
        "fails", "undecided", "holds", "measured", "not made"
    ]  # fmt: skip
    assert found[0].gates == (("consistent", "fails"), ("other", "holds"))
    assert found[0].warnings == ("norms differ at row 4",)
    assert found[-1].skipped == "<i>no</i> tuned lens" and found[-1].name == "skipped one"


def test_one_line_counts_and_names_what_failed() -> None:
    line = checks_line({"diagnostics": SECTIONS})
    assert line is not None
    assert "4 of 5 checks" in line and "failed: which norm reads the row." in line
    assert checks_line({}) is None


@pytest.mark.parametrize("sections", [SECTIONS, {}])
def test_the_page_lists_them_or_says_how_to_ask(sections: dict[str, Any]) -> None:
    table = synthetic_table()
    summary = small_summary(table) | {"diagnostics": sections}
    page = layers_page((table, summary, {}))
    assert ("--diagnostics standard" in page) == (not sections)
    assert ("norms differ at row 4" in page) == bool(sections)
    assert "<i>no</i>" not in page


def test_evidence_leaves_what_the_checks_list() -> None:
    def shown(**evidence: Any) -> tuple[tuple[str, str], ...]:
        entry = {"code": "x", "evidence": {"gates": ["a"], "thresholds": {"t": 1}, **evidence}}
        (reason,) = reasons({"measurement_guidance": {"reasons": [entry]}})
        return reason.evidence

    assert shown(measured=2, warnings=["w"]) == (("gates", "a"), ("measured", "2"))
    # A sentence says more than the name of a gate.
    assert shown(warnings=["w", "v"]) == (("for instance", "w"),)
