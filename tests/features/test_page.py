"""docs/features.md runs as written, and lists every format and alarm."""

from __future__ import annotations

import json
import re
import shlex
from itertools import islice
from pathlib import Path

import pytest

from layerscope.cli.app import run
from layerscope.demo import dictionaries_path, model_path
from layerscope.features import check as checking
from layerscope.features.formats import FORMATS
from support.shared import REPOSITORY

PAGE = REPOSITORY / "docs" / "features.md"
TEXT = PAGE.read_text("utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)
    assert found
    return found


needs_model = pytest.mark.skipif(
    not (model_path() / "model.safetensors").exists(), reason="the embedded model is not built"
)


@needs_model
def test_the_page_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "__docs__"}
    for source in blocks("python"):
        exec(compile(source, str(PAGE), "exec"), names)
    assert "\nsite it fits resid_" in capsys.readouterr().out


@needs_model
def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerscope.features.demo_set import documents

    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": each.text}) for each in islice(documents(3), 400) if each.text]
    Path("text.jsonl").write_text("\n".join(lines))
    places = {
        "MODEL": str(model_path()),
        "DICTIONARIES": str(dictionaries_path()),
        "TEXT": "text.jsonl",
    }
    commands = [line for block in blocks("console") for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "layerscope"
        assert run([places.get(word, word) for word in words]) == 0, command


def test_every_format_and_alarm_is_listed() -> None:
    for each in FORMATS:
        assert f"| {each.code} | `{each.name}`" in TEXT, each.code
    source = Path(checking.__file__).read_text("utf-8")
    codes = set(re.findall(r'(?:Alarm|_Cause)\(\s*"(\w+)"', source))
    assert len(codes) == 8
    assert [code for code in codes if f"`{code}`" not in TEXT] == []
