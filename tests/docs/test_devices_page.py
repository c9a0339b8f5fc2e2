"""docs/devices.md runs as written, and its table is the one in the code."""

from __future__ import annotations

import re
import shlex

import pytest

from layerscope.cli.app import run
from layerscope.demo import model_path
from layerscope.models.backends.huggingface.quantised import ASKED, SCHEMES, disallows
from support.shared import REPOSITORY

PAGE = REPOSITORY / "docs" / "devices.md"


@pytest.fixture(autouse=True)
def embedded() -> None:
    if not (model_path() / "model.safetensors").exists():
        pytest.skip("the embedded model has no weights here")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert found
    return found


def test_it_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "__docs__"}
    for source in blocks("python"):
        exec(compile(source, str(PAGE), "exec"), names)
    assert "loaded" in capsys.readouterr().out


def test_the_output_shown_is_what_comes_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    (command,) = blocks("console")
    words = shlex.split(command)[1:]
    assert run([str(model_path()) if word == "MODEL" else word for word in words]) == 0
    said = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    (shown,) = blocks("text")
    rows = [line for line in shown.splitlines() if line.startswith(("│ float", "│ bf", "in the"))]
    assert len(rows) == 3
    for row in rows:
        start = row[:80]  # the verdict is this machine's
        assert any(line.startswith(start) for line in said), start


def test_the_table_is_that_of_the_code() -> None:
    text = PAGE.read_text("utf-8")
    lines = re.findall(r"^\| (.+) \|$", text.split("| Asked |")[1], re.M)
    table = {cells[0]: cells[1:] for cells in (line.split(" | ") for line in lines)}
    header = re.search(r"^\| Asked \| (.+) \|$", text, re.M)
    assert header is not None
    assert header[1].split(" | ") == [f"`{name}`" for name in SCHEMES]
    for what in ASKED:
        expected = ["no" if disallows(row, what) else "yes" for row in SCHEMES.values()]
        assert table[f"`{what}`"] == expected
    needs = [", ".join(pip for _, pip in row.packages) for row in SCHEMES.values()]
    assert table["needs"] == needs
    unpacked = ["unpacked" if row.unpacked_on_cpu else "packed" for row in SCHEMES.values()]
    assert table["without an accelerator"] == unpacked
