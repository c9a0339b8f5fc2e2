from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerscope.cli.app import run
from layerscope.measures.summary import summarise
from layerscope.reports.files import write_run_files
from layerscope.store import DEFAULT_STORE, Store, close_run_dir, open_run_dir
from support.tables import synthetic_table


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make two finished runs of other depths in the default store; return their ids."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    ids: list[str] = []
    with Store.open(DEFAULT_STORE) as store:
        for n_layers in (6, 9):
            folder = open_run_dir(tmp_path / f"out{n_layers}", key=str(n_layers))
            table = synthetic_table(n_layers=n_layers, n_facts=3)
            summary = summarise(table).to_dict()
            model = {"name": "synthetic"}
            provenance = {"model": {"dtype": "float32", "weights_sha256": str(n_layers)}}
            with store.start(
                config={}, prompts=[{"n": n_layers}], model=model, out_dir=folder.path
            ) as handle:
                for path in write_run_files(table, summary, provenance, folder.path):
                    kind = "table" if path.suffix == ".parquet" else path.name
                    handle.add_artifact(kind, path)
                handle.save_result("summary", summary)
                handle.finish(provenance)
                ids.append(handle.id)
            close_run_dir(folder.path)
    return ids


def output(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert run(["compare", *words]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def parsed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(output(capsys, *words, "--json"), parse_constant=pytest.fail)


def test_ids_folders_and_tables_say_the_same(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    by_id = parsed(capsys, runs[0][:5], runs[1])
    by_folder = parsed(capsys, "out6", "out9/run-latest")
    tables = [str(next(Path(name).rglob("*.parquet"))) for name in ("out6", "out9")]
    by_table = parsed(capsys, *tables)
    for other in (by_folder, by_table):
        for key in by_id["milestones"]["norm"]:
            assert [
                (entry["median"], entry["refused"])
                for entry in other["milestones"]["norm"][key]["runs"]
            ] == [
                (entry["median"], entry["refused"])
                for entry in by_id["milestones"]["norm"][key]["runs"]
            ]
        assert [entry["n_layers"] for entry in other["runs"]] == [6, 9]
        assert [entry["trust"] for entry in other["runs"]] == [
            entry["trust"] for entry in by_id["runs"]
        ]


def test_text_and_page(runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = output(capsys, *runs, "--html", str(tmp_path / "page.html"))
    assert "Onset of the answer, median of 3 facts" in text
    assert runs[0] in text and "median depth, norm lens" in text
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{a}",), "two runs or more"),
        (("{a}", "{a}"), "named twice"),
        (("{a}", "nowhere"), "no run 'nowhere'"),
        (("{a}", "{empty}"), "holds no layers or battery run"),
        (("{a}", "{b}", "--lens", "tuned"), "no run has a tuned lens"),
        (("{a}", "{b}", "--store", "absent.db"), "there is no runs database absent.db"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    said: str,
    runs: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    given = [word.format(a=runs[0], b=runs[1], empty="empty") for word in words]
    error = output(capsys, *given, code=2)
    assert said in error and error.count("\n") == 1


def test_only_finished_runs_with_milestones(
    runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with Store.open(DEFAULT_STORE) as store:
        failed = store.start(config={}, model={"name": "x"}, prompts=[], out_dir=tmp_path / "f")
        failed.fail("no memory")
        patch = store.start(
            experiment="patch", config={}, model={"name": "x"}, prompts=[], out_dir=tmp_path / "p"
        )
        patch.finish({})
    assert f"run {failed.id} is failed" in output(capsys, runs[0], failed.id, code=2)
    assert "experiment patch" in output(capsys, runs[0], patch.id, code=2)
