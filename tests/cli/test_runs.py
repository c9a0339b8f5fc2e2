from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from layerscope.cli.app import run
from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from layerscope.reports.files import write_run_files
from layerscope.store import DEFAULT_STORE, Store, close_run_dir, open_run_dir
from support.tables import synthetic_table

ODD_NAME = "org/[bold]odd[/bold]"


@cache
def made(seed: int) -> tuple[LayersTable, dict[str, Any]]:
    table = synthetic_table(seed=seed)
    return table, summarise(table).to_dict()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make two finished runs and a failed one in the default store; return their ids."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    ids: list[str] = []
    with Store.open(DEFAULT_STORE) as store:
        for seed in (0, 1):
            folder = open_run_dir(tmp_path / "out", key=str(seed))
            table, summary = made(seed)
            options: dict[str, Any] = {"config": {"seed": seed}, "prompts": [{"text": "x"}]}
            with store.start(**options, model={"name": ODD_NAME}, out_dir=folder.path) as handle:
                for path in write_run_files(table, summary, {}, folder.path):
                    handle.add_artifact(path.name, path)
                handle.save_result("summary", summary)
                handle.finish({"seed": seed})
                ids.append(handle.id)
            close_run_dir(folder.path)
        failed = store.start(config={}, model={"name": "broken"}, prompts=[], out_dir=tmp_path)
        failed.fail("ModelError: the weights are truncated")
        ids.append(failed.id)
    return ids


def output(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert run(["runs", *words]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def parsed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(output(capsys, *words, "--json"), parse_constant=pytest.fail)


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_lists_one_command_a_line(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = output(capsys, "--help").splitlines()
    for name in ("list", "show RUN", "compare RUN RUN", "export RUN PATH", "delete RUN"):
        assert any(line.strip().startswith(f"• layerscope runs {name}: ") for line in lines), name


def test_list(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "list")
    assert all(run_id in text for run_id in runs)
    assert ODD_NAME in text, "a model's name is not markup"
    assert text.index(runs[2]) < text.index(runs[0])
    listed = parsed(capsys, "list")
    assert [entry["id"] for entry in listed] == runs[::-1]
    assert listed[0]["error"] == "ModelError: the weights are truncated"


def test_list_selects(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def ids(*words: str) -> list[str]:
        return [entry["id"] for entry in parsed(capsys, "list", *words)]

    assert ids("--status", "failed") == [runs[2]]
    assert ids("--model", "ODD", "--limit", "1") == [runs[1]]
    assert ids("--model", "none") == []
    assert "no such runs" in output(capsys, "list", "--model", "none")


def test_show(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "show", runs[0][:8])
    assert "output-synthetic.json" in text and "Germany→Berlin" in text
    found = parsed(capsys, "show", runs[0])
    assert found["id"] == runs[0] and len(found["artifacts"]) == 8
    assert found["summary"]["n_layers"] == 6 and found["provenance"] == {"seed": 0}
    assert "the weights are truncated" in output(capsys, "show", "latest")


def test_compare(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _failed = runs
    text = output(capsys, "compare", first, second)
    assert "main milestones are equal" in text
    found = parsed(capsys, "compare", first, second)
    assert found["config"] == [{"option": "seed", "a": 0, "b": 1}]
    moved = [
        (entry["fact_key"], name)
        for entry in found["passes"]
        for name, moments in entry["milestones"].items()
        if entry["lens"] == "norm" and moments["first"]["delta"] not in (None, 0)
    ]
    assert ("Germany→Berlin", "first_kl_below_0.5") in moved
    assert "first_kl_below_0.5" in text
    assert "L_geom" in output(capsys, "compare", first, second, "--all")
    same = output(capsys, "compare", first, first)
    assert "b - a" not in same


def test_a_run_without_summary_cannot_be_compared(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, "compare", runs[0], runs[2], code=2)
    assert "has no result 'summary'" in text and text.count("\n") == 1


@pytest.mark.parametrize("name", ["export.zip", "folder"])
def test_export(
    runs: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    found = parsed(capsys, "export", runs[1], str(tmp_path / name))
    assert found == {"run": runs[1], "path": str(tmp_path / name), "files": 8}
    assert (tmp_path / name).exists()
    again = output(capsys, "export", runs[1], str(tmp_path / name), code=2)
    assert "exists already" in again and again.count("\n") == 1


def test_delete(
    runs: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.confirm", lambda *_args, **_kwargs: (_ for _ in ()).throw(_abort()))
    assert run(["runs", "delete", runs[0]]) != 0
    capsys.readouterr()
    assert len(parsed(capsys, "list")) == 3
    assert parsed(capsys, "delete", runs[0], "--yes")["deleted"] == runs[0]
    assert [entry["id"] for entry in parsed(capsys, "list")] == [runs[2], runs[1]]


def _abort() -> Exception:
    import typer

    return typer.Abort()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "{0}x"], "did you mean '{0}'"),
        (["show", "nothing-like-it"], "see `layerscope runs list`"),
        (["list", "--status", "finishd"], "did you mean 'finished'"),
        (["show", "latest", "--store", "nowhere.db"], "there is no runs database nowhere.db"),
    ],
)
def test_a_mistake_is_one_line_with_the_fix(
    runs: list[str], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    text = output(capsys, *(word.format(runs[0]) for word in words), code=2)
    assert message.format(runs[0]) in text and text.count("\n") == 1


def test_looking_creates_no_database(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "run something first" in output(capsys, "list", code=2)
    assert list(tmp_path.iterdir()) == []
