"""``layerscope fit prism|tuned|temperature|jacobian`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import layerscope
from layerscope.cli.app import run
from layerscope.lenses import load_lens
from support.tiny_models import tiny, tiny_tokenizer

WORDS = "Once upon a time there was a girl in the capital of France, Paris. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    lines = [json.dumps({"story": f"{number} {WORDS * 3}"}) for number in range(200)]
    path.write_text("\n".join(lines), "utf-8")
    return path


SMALL = ["--held-out", "512", "--context", "32", "--positions", "8", "--batch", "8"]
EXTRA = {
    "prism": ["--tokens", "2048", "--rank", "8"],
    "tuned": ["--tokens", "2048", "--epochs", "1", "--rank", "4"],
    "temperature": ["--tokens", "1024"],
    "jacobian": ["--sequences", "4", "--skip", "4"],
}


@pytest.mark.parametrize("kind", list(EXTRA))
def test_each_lens_is_fitted_stored_and_read_again(
    kind: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", kind, str(model), "--text", str(text), "--field", "story", *SMALL]
    assert run([*words, *EXTRA[kind], "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == kind and found["folder"] == str(tmp_path)
    opened = layerscope.load(model)
    bits = found["held_out"]["kl_bits"]
    assert len(bits[kind]) == len(bits["norm"]) == opened.n_layers + 1
    assert load_lens(tmp_path, opened).name == kind


def test_the_table_and_the_verdict_are_shown(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = ["fit", "temperature", str(model), "--text", str(text), "--field", "story", *SMALL]
    assert run([*words, "--tokens", "1024"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "held-out positions" in shown and "temperature" in shown
    assert "stored in layerscope-lenses/tiny/temperature" in shown
    assert (tmp_path / "layerscope-lenses" / "tiny" / "temperature" / "lens.json").exists()


def test_what_is_wrong_is_one_line(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "tuned", str(model), "--text", str(text), *SMALL, "--out", str(tmp_path)]
    assert run(words) == 2
    assert "has no field 'text'" in capsys.readouterr().err
    assert run([*words, "--field", "story", "--tokens", "10000000"]) == 2
    assert "too short for the fit" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
