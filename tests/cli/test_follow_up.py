"""`layerscope follow-up` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from layerscope.cli.app import run
from layerscope.demo import model_path

TABLES = ("items", "patches", "heads", "curve", "directions", "mediation", "languages", "excluded")


def follow_up(*words: object) -> int:
    return run(["follow-up", str(model_path()), *(str(word) for word in words)])


def test_a_run_writes_tables_page_and_json_and_is_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--relations", "capital", "--limit", 16, "--alphas=-1,1", "--random", 1)
    assert follow_up(*words, "--out", tmp_path, "--json") == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    latest = tmp_path / "run-latest"
    assert {path.stem for path in latest.glob("*.parquet")} == {*TABLES, "vectors"}
    items = pl.read_parquet(latest / "items.parquet")
    counts = answer["summary"]["counts"]
    assert items.height == counts["followed"] >= 4
    assert set(items["relation"]) == {"capital"}
    # Contrasts come from the whole battery, although only capitals are followed.
    assert list(answer["summary"]["fitted"]) == ["capital"]
    doses = pl.read_parquet(latest / "directions.parquet")
    assert set(doses["alpha"].drop_nulls()) == {-1.0, 1.0} and set(doses["draw"]) == {0}
    page = (latest / "report.html").read_text(encoding="utf-8")
    assert "https://" not in page and "causal onset" in page


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (("--alphas", "1,x"), "--alphas takes numbers split by commas, not '1,x'"),
        (("--alphas", "0"), "not 0"),
        (("--relations", "capitol"), "did you mean 'capital'"),
        (("--languages", "de"), "no item in 'en'; set language to one of de"),
        (("--lens", "raw"), "add norm"),
    ),
)
def test_mistakes_get_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow_up(*words, "--limit", 2, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
