"""docs/cli.md is what the commands themselves say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_command_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    written = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert build.cli_reference() == written, "run `make docs`"
