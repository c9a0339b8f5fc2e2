"""docs/families.md is what the survey of every class finds."""

from __future__ import annotations

import re
from pathlib import Path

from support.survey import EVERYTHING, family_table, survey

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def test_the_family_table_is_current_and_explains_every_failure():
    rows = [survey(key) for key in EVERYTHING]
    loaded = {row.class_name for row in rows if row.family}
    assert len(loaded) >= 40
    for row in rows:
        if not row.family:
            # A number that failed, or what about the architecture cannot be read.
            explained = re.search(r"off by|^it |its blocks have no", row.refusal)
            assert explained, f"{row.key}: {row.refusal}"
            assert "\n" not in row.refusal and "Error" not in row.refusal, row.refusal
    assert family_table(rows) == PAGE.read_text(encoding="utf-8"), "run `make docs`"
