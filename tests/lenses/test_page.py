"""docs/lenses.md runs as written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from layerscope.cli.app import run
from layerscope.demo import model_path
from layerscope.lenses import load_lens
from support.shared import REPOSITORY

PAGE = REPOSITORY / "docs" / "lenses.md"
SMALL = ["--held-out", "1024", "--context", "64", "--positions", "16"]


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert found
    return found


@pytest.mark.slow
def test_the_page_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (model_path() / "model.safetensors").exists():
        pytest.skip("the embedded model has no weights here")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__docs__"}
    for source in blocks("python"):
        exec(compile(source, str(PAGE), "exec"), names)
    assert "temperature [" in capsys.readouterr().out
    for command in blocks("console")[0].splitlines():
        program, group, kind, model, *rest = shlex.split(command)
        assert (program, group, model) == ("layerscope", "fit", "MODEL")
        if kind == "jacobian":
            rest[-1] = "1"  # a Jacobian of this width takes a while
        else:
            rest += ["--tokens", "2048"]
        assert run([group, kind, str(model_path()), *rest, *SMALL]) == 0
    assert load_lens("lenses/prism", names["model"]).name == "prism"  # type: ignore[arg-type]
