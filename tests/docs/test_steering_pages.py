"""The pages on steering and function vectors run as written."""

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


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    text = (DOCS / page).read_text("utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def execute(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__docs__"}
    for line, source in blocks(page, "python"):
        exec(compile("\n" * line + source, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", ("steering.md", "function-vectors.md"))
def test_commands_run_as_written(page: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for _, block in blocks(page, "console"):
        for command in filter(None, block.split("\n")):
            words = [
                str(model_path()) if word == "MODEL" else word for word in shlex.split(command)
            ]
            assert run(words[1:]) == 0, f"{command}: {capsys.readouterr().err}"


def test_the_page_on_steering_holds(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = execute("steering.md")
    summary = names["found"].summary
    assert summary["response"]["low"] > summary["random"]["largest_absolute_slope"]
    assert abs(names["curve"].bits - 0.2) <= 0.02 * 0.2 and names["curve"].monotone
    assert names["again"].typical_norm == names["vector"].typical_norm


def test_the_page_on_steering_is_right_about_the_block_that_turns_round() -> None:
    from layerscope.experiments.steering import SteeringConfig, steering
    from layerscope.models import load

    model = load(model_path(), device="cpu", dtype="float32", verify=False)
    reviews = blocks("steering.md", "python")  # the page's own contrasts
    assert "demo_reviews(40)" in reviews[0][1]
    from layerscope.experiments.steering.builtin import demo_reviews

    config = SteeringConfig(layers=(1,), random_directions=1, alphas=(-0.4, 0.4))
    response = steering(model, demo_reviews(40), (), config).summary["response"]
    assert response["high"] < 0


def test_the_page_on_function_vectors_holds() -> None:
    names = execute("function-vectors.md")
    zero = names["found"].summary["test_top1"]["zero_shot"]
    assert zero["vector"] > max(zero["none"], zero["random_mean"]) + 0.3
    assert any("shuffling" in line for line in names["found"].summary["warnings"])
    words = [names["model"].decode_token(int(token)) for token in names["logits"].argmax(-1)]
    assert words == [" take", " cry"]
