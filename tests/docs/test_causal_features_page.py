"""docs/causal-features.md runs as written."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest

from layerscope.cli.app import run

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "causal-features.md"
spec = importlib.util.spec_from_file_location("docs_pages", HERE / "test_docs.py")
assert spec is not None and spec.loader is not None
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)


def test_the_page_on_causal_features_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = pages.execute(PAGE)
    assert names["found"].summary["identity"]["differing"] == 0
    first = pages.blocks(PAGE, "console")[0][1].strip()
    assert run(shlex.split(first)[1:]) == 0, capsys.readouterr().err
    assert (tmp_path / "layerscope-runs" / "run-latest" / "data" / "prompts.json").is_file()
    assert (tmp_path / "layerscope-runs" / "run-latest" / "report.html").is_file()
