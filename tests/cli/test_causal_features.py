"""``layerscope causal-features``: kept, repeated to the same bytes, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from layerscope.cli.app import run
from layerscope.demo import model_path

WORDS = ["causal-features", "--layer", "6", "--top", "1", "--trials", "6"]


def test_a_run_is_kept_and_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for name, batch in (("a", "256"), ("b", "5")):
        options = ["--json", "--out", str(tmp_path / name), "--batch", batch]
        assert run([*WORDS, *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["summary"] == found[1]["summary"]
    for table in ("effects", "features", "conditions", "responses"):
        frames = [pl.read_parquet(f"{each['run_dir']}/{table}.parquet") for each in found]
        assert frames[0].equals(frames[1]), table
    names = {Path(path).name.split("_")[0] for path in found[0]["data"]}
    assert names == {"checkpoint", "responses", "prompts.json"}
    assert "<html" in Path(found[0]["report"]).read_text("utf-8")
    assert run([*WORDS, "--out", str(tmp_path / "a"), "--data", str(tmp_path / "data")]) == 0
    said = capsys.readouterr().out
    assert "for layerscope pathways" in said and "warning" in said
    assert len(list((tmp_path / "data").iterdir())) == 3


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = (
        (["causal-features", "--temperature", "0"], "copies of one another"),
        (["causal-features", str(tmp_path)], "--dictionaries"),
        (["causal-features", str(model_path()), "--layer", "99"], "no dictionary of layer 99"),
        (["causal-features", "--task", str(tmp_path / "no.yaml")], "cannot be read as a task"),
    )
    for words, part in cases:
        assert run([*words, "--out", str(tmp_path / "runs")]) == 2, words
        said = capsys.readouterr().err
        assert part in said and "Traceback" not in said, said
