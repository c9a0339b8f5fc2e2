"""The page on paths, ablations and back-patching runs as written, and what it says holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.shared import REPOSITORY

PAGE = REPOSITORY / "docs" / "paths-and-ablations.md"


def test_the_page_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__docs__"}
    text = PAGE.read_text("utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start(1))
        exec(compile("\n" * line + found[1], str(PAGE), "exec"), names)
    assert names["paths"].summary["verified"]["worst_error"] < 1e-3
    assert all(row["control"] is not None for row in names["paths"].summary["top"][:4])
    best = names["lost"].summary["top"][0]
    assert best["size"] > best["control_size"]
    assert names["grid"].summary["prompts"]["wrong"] == 2
    assert set(names["grid"].summary["any_cell"]) == {
        "back-patch",
        "random position",
        "random layer",
    }
