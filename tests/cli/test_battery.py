"""`layerscope battery` as a user runs it, on a tiny random model in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from layerscope.cli.app import run
from layerscope.store import Store
from support.tiny_models import tiny, tiny_tokenizer

TABLE = (
    "relation,subject,answer,prompt,variant,frequency\n"
    "word,one,Berlin,One two three is,orig,high\n"
    "word,one,Berlin,Once upon a time was,p01,high\n"
    "word,two,Paris,She loved the,orig,low\n"
    "word,bad,Berlin,The word Berlin is,orig,low\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "mine.csv"
    path.write_text(TABLE, encoding="utf-8")
    return path


def battery(*words: object) -> int:
    return run(["battery", *(str(word) for word in words)])


def test_run_writes_tables_page_store_and_json(
    folder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert battery(folder, "--battery", table, "--out", out, "--json") == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    latest = out / "run-latest"
    for name in ("rows", "prompts", "items", "rollup", "excluded"):
        assert pl.read_parquet(latest / f"{name}.parquet").width > 1
    items = pl.read_parquet(latest / "items.parquet")
    assert set(items["item"]) == {"word/en/one", "word/en/two"}
    assert answer["summary"]["counts"]["items"] == 2
    page = (latest / "report.html").read_text(encoding="utf-8")
    assert "word/en/bad" in page and "https://" not in page
    with Store.open(out / "layerscope.db") as store:
        (info,) = store.runs()
        assert info.status == "finished"


def test_terminal_names_what_was_left_out(
    folder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = (folder, "--battery", table, "--out", out, "--no-html", "--parts", "none")
    assert battery(*words) == 0
    printed = capsys.readouterr().out
    assert "2 facts" in printed and "left out" in printed and "run-latest" in printed
    assert not (out / "run-latest" / "report.html").exists()


def test_shipped_battery_with_a_limit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--relations", "capital", "--limit", 12, "--parts", "permuted", "--json", "--no-html")
    assert battery(folder, *words, "--out", tmp_path / "out") == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["battery"] == "countries"
    assert [entry["language"] for entry in summary["languages"]] == ["en"]
    assert summary["languages"][0]["tried"] == 12


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--battery", "none.csv"), "does not exist"),
        (("--relations", "capitol"), "did you mean 'capital'"),
        (("--parts", "paraphrase"), "did you mean 'paraphrases'"),
        (("--lens", "nrom"), "did you mean 'norm'"),
        (("--limit", "0"), "at least 1"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, str],
    says: str,
) -> None:
    assert battery(folder, *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
