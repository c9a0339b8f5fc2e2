from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from layerscope.cli.app import run
from support.shared import shared_path
from support.tables import synthetic_table


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    path = tmp_path / "output-synthetic-layers.parquet"
    synthetic_table().write_parquet(path)
    return path


def published(name: str = "gemma-2-9b") -> tuple[str, str]:
    stem = f"output-{name}-pure-next-token"
    return tuple(str(shared_path("published", stem + end)) for end in (".csv", "-rawlens.csv"))  # type: ignore[return-value]


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run(["measures", *words, "--json"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    return json.loads(out.out, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def test_json_of_a_parquet_table(parquet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = as_json(capsys, str(parquet))
    base = document["passes"][document["baseline"]]
    assert document["model"] == "synthetic"
    assert document["L_semantic"] == base["L_semantic"] == 3
    assert document["first_kl_below_0.5"] == base["first_kl_below_0.5"]
    assert len(document["passes"]) == 10


def test_thresholds_from_the_command_line(
    parquet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = as_json(capsys, str(parquet))
    strict = as_json(capsys, str(parquet), "--copy-threshold", "0.999")
    assert (plain["L_copy"], strict["L_copy"]) == (0, None)
    wide = as_json(capsys, str(parquet), "--copy-margin", "1.0")
    assert wide["L_copy"] is None
    soft = as_json(capsys, str(parquet), "--copy-soft-thresh", "0.7")
    assert (plain["milestones"]["L_copy_soft_k1"]["lost"]) == [2]
    assert (soft["milestones"]["L_copy_soft_k1"]["lost"]) == [1]
    ks = as_json(capsys, str(parquet), "--copy-soft-window-ks", "1,4")
    assert list(ks["L_copy_soft"]) == ["1", "4"]
    assert ks["config"]["copy_soft_window_ks"] == [1, 4]


def test_summary_for_people(parquet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measures", str(parquet)]) == 0
    text = capsys.readouterr().out
    for words in ("synthetic", "Milestones of Germany→Berlin", "L_semantic", "Checks", "control"):
        assert words in text


def test_keys_are_text_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = synthetic_table(n_layers=3, n_facts=1)
    key = "[/b] [bold]x"
    prompts = tuple(
        replace(prompt, fact_key=key) if prompt.fact_key else prompt
        for prompt in table.meta.prompts
    )
    rows = table.rows.with_columns(pl.lit(key).alias("fact_key"))
    path = tmp_path / "x.parquet"
    replace(table, rows=rows, meta=replace(table.meta, prompts=prompts)).write_parquet(path)
    assert run(["measures", str(path)]) == 0
    assert f"Milestones of {key}" in capsys.readouterr().out


@pytest.mark.golden
def test_published_tables(capsys: pytest.CaptureFixture[str]) -> None:
    table, rawlens = published()
    document = as_json(capsys, table, "--rawlens", rawlens)
    assert document["L_copy"] == 0
    assert document["L_semantic"] == 42
    assert document["first_kl_below_0.5"] is None
    assert document["semantic_gate"]["L_semantic_strong"] == 42
    assert document["copy_thresholds"]["stability"] == "stable"
    assert document["raw_lens_full"]["score"]["tier"] == "high"
    alone = as_json(capsys, table)
    assert alone["raw_lens_full"] is None
    assert alone["L_semantic"] == 42


@pytest.mark.golden
def test_the_tuned_table_can_confirm(capsys: pytest.CaptureFixture[str]) -> None:
    table, rawlens = published()
    without = as_json(capsys, table, "--rawlens", rawlens)["confirmed_semantics"]
    assert (without["L_semantic_confirmed"], without["confirmed_source"]) == (None, "none")
    tuned = table.replace(".csv", "-tuned.csv")
    words = (table, "--rawlens", rawlens, "--tuned", tuned)
    confirmed = as_json(capsys, *words)["confirmed_semantics"]
    assert (confirmed["L_semantic_confirmed"], confirmed["confirmed_source"]) == (42, "tuned")


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_lists_one_milestone_a_line(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run(["measures", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("L_copy", "L_semantic", "L_semantic_confirmed", "first_kl_below_1.0"):
        assert any(line.strip().startswith(f"• {name}: ") for line in lines), name


@pytest.mark.golden
def test_published_flags_cannot_be_loosened(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measures", published()[0], "--copy-threshold", "0.6"]) == 2
    assert "cannot be recomputed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.parquet"], "is not a file"),
        (["{parquet}", "--rawlens", "{parquet}"], "goes with a published CSV"),
        (["{parquet}", "--rawlens", "nowhere.csv"], "is not a file"),
        (["{parquet}", "--tuned", "{parquet}"], "--tuned goes with a published CSV"),
        (["{parquet}", "--tuned", "nowhere.csv"], "is not a file"),
        (["{parquet}", "--copy-threshold", "1.5"], "must be in"),
        (["{parquet}", "--copy-threshold", "nan"], "must be in"),
        (["{parquet}", "--copy-soft-window-ks", "1,two"], "not a list of whole numbers"),
        (["{parquet}", "--copy-soft-window-ks", "0"], "at least 1"),
        (["{text}"], "not a readable Parquet"),
        (["{csv}"], "lacks the column"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    message: str,
    parquet: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, csv = tmp_path / "x.parquet", tmp_path / "x.csv"
    text.write_text("layer,pos\n1,2\n")
    csv.write_text("layer,pos\n1,2\n")
    names = {"parquet": str(parquet), "text": str(text), "csv": str(csv)}
    assert run(["measures", *(word.format(**names) for word in words), "--json"]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", out.err)
    assert message in out.err


def test_the_earlier_set_of_files(parquet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = parquet.parent / "deep" / "compat"
    assert run(["measures", str(parquet), "--compat", str(folder)]) == 0
    names = {path.name for path in folder.iterdir()}
    assert {"output-synthetic-pure-next-token.csv", "output-synthetic.json"} <= names
    out = capsys.readouterr().out
    assert all(str(folder / name) in out for name in names)
    document = json.loads((folder / "output-synthetic.json").read_text())
    assert document["status"] == "ok"


def test_published_files_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, _ = published()
    assert run(["measures", table, "--companions", "--compat", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "gemma-2-9b"
    name = "output-gemma-2-9b-pure-next-token-prism.csv"
    assert (tmp_path / name).read_bytes() == shared_path("published", name).read_bytes()
