"""The pages on attribution and heads run as written, and their figures are the models' own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from layerscope.cli.app import run
from layerscope.demo import model_path
from support.shared import REPOSITORY

DOCS = REPOSITORY / "docs"
PAIRS = """
- {key: a, answer: Paris, foil: Tokyo,
   clean: The capital of France is called, corrupt: The capital of Japan is called}
- {key: b, answer: Madrid, foil: Rome,
   clean: The capital of Spain is called, corrupt: The capital of Italy is called}
"""


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    text = (DOCS / page).read_text("utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def execute(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__docs__"}
    for line, source in blocks(page, "python"):
        exec(compile("\n" * line + source, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", ("attribution.md", "heads.md"))
def test_commands_run_as_written(page: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.yaml").write_text(PAIRS, encoding="utf-8")
    for _, block in blocks(page, "console"):
        for command in filter(None, block.split("\n")):
            words = [
                str(model_path()) if word == "MODEL" else word for word in shlex.split(command)
            ]
            assert run(words[1:]) == 0, f"{command}: {capsys.readouterr().err}"


def test_the_page_on_attribution_holds() -> None:
    names = execute("attribution.md")
    assert names["refused"] == {}
    assert len(names["report"].nodes) == 10 and not names["report"].blind
    curve = names["curve"]
    assert curve.faithfulness[0] == pytest.approx(0, abs=1e-3)
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-3)
    assert 0 < len(names["circuit"].edges) <= 30


def test_the_page_on_heads_holds() -> None:
    names = execute("heads.md")
    assert set(names["induction"]) == {(2, 0), (2, 1)}
    assert float(names["found"].remainder.abs().max()) < 1e-4
    assert names["places"].shape[0] == names["model"].n_heads
