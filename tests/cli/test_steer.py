"""``layerscope steer`` and ``layerscope fv``: runs that are kept, read back and refused."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from layerscope.cli.app import run
from layerscope.demo import model_path
from layerscope.interventions.steering.vector import load_vector
from layerscope.models import load

DEMO = str(model_path())
STEER = [
    "steer", DEMO, "--contrast", "demo:reviews", "--layer", "4", "--layer", "6", "--alpha=-0.3,0.3",
    "--random", "2", "-n", "6", "--kl", "0.1",
    "--prompt", "I watched The Silver River last week. The music was",
]  # fmt: skip
FV = ["fv", DEMO, "--task", "demo:spanish", "--prompts", "8", "--trials", "6", "--heads", "1,5"]


@pytest.mark.parametrize(
    ("words", "tables"),
    (
        (STEER, {"layers", "responses", "slopes", "texts", "damage", "calibration", "vector"}),
        (FV, {"heads", "effects", "sweep", "queries", "vector"}),
    ),
    ids=("steer", "fv"),
)
def test_a_run_is_kept_and_repeated_to_the_same_bytes(words, tables, tmp_path, capsys):
    options = ["--json", "--out", str(tmp_path / "runs"), "--save", str(tmp_path / "vector")]
    assert run([*words, *options]) == 0
    first = json.loads(capsys.readouterr().out)
    names = {path.rsplit("/", 1)[-1] for path in first["files"]}
    assert {f"{table}.parquet" for table in tables} | {"summary.json"} <= names
    assert "<html" in Path(first["report"]).read_text("utf-8")
    assert run([*words, "--json", "--out", str(tmp_path / "again")]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["summary"] == first["summary"]
    for table in tables:
        frames = [pl.read_parquet(f"{each['run_dir']}/{table}.parquet") for each in (first, second)]
        assert frames[0].equals(frames[1])
    model = load(DEMO, device="cpu", verify=False)
    vector = load_vector(tmp_path / "vector", model)
    assert vector.vector.shape == (model.d_model,)
    assert run([*words, "--out", str(tmp_path / "runs")]) == 0
    assert "warning" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path, capsys):
    cases = (
        (["steer", DEMO, "--contrast", str(tmp_path / "no.json")], "does not exist"),
        (
            ["steer", DEMO, "--contrast", "demo:reviews", "--alpha", "much"],
            "numbers split by commas",
        ),
        (["steer", DEMO, "--contrast", "demo:reviews", "--layer", "99"], "there is no layer 99"),
        (
            ["steer", DEMO, "--contrast", "demo:reviews", "--neutral", str(tmp_path / "no.txt")],
            "cannot be read as lines of text",
        ),
        (["fv", DEMO, "--task", "demo:latin"], "unknown task 'latin'"),
        (["fv", DEMO, "--task", "demo:past", "--heads", "few"], "numbers split by commas"),
        (["fv", DEMO, "--task", "demo:past", "--layout", "Q:|A:"], "three texts split by |"),
    )
    for words, message in cases:
        assert run(words) == 2
        assert message in capsys.readouterr().err
