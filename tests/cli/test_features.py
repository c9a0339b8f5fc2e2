"""``layerscope features``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerscope.cli.app import run
from layerscope.demo import dictionaries_path, model_path

pytestmark = pytest.mark.skipif(
    not (model_path() / "model.safetensors").exists(), reason="the embedded model is not built"
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    from itertools import islice

    from layerscope.features.demo_set import documents

    path = tmp_path / "text.jsonl"
    lines = [
        json.dumps({"text": document.text})
        for document in islice(documents(7, validation=True), 400)
        if document.text
    ]
    path.write_text("\n".join(lines))
    return path


def test_inspect_lists_headers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["features", "inspect", str(dictionaries_path()), "--json", "--convention"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["layer"], one["features"], one["format"]) for one in found] == [
        (layer, 1536, "F1") for layer in range(8)
    ]
    assert all("pre-bias yes" in one["convention"] for one in found)
    assert run(["features", "inspect", str(dictionaries_path())]) == 0
    assert "1,536" in capsys.readouterr().out
    assert run(["features", "inspect", str(tmp_path)]) == 2
    assert "holds no dictionary" in capsys.readouterr().err


def test_a_damaged_file_is_named_and_the_others_listed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for layer in (0, 1):
        folder = tmp_path / f"resid_post.{layer}"
        folder.mkdir()
        for source in (dictionaries_path() / folder.name).iterdir():
            (folder / source.name).write_bytes(source.read_bytes())
    broken = tmp_path / "resid_post.1" / "sae_weights.safetensors"
    broken.write_bytes(broken.read_bytes()[:5000])
    assert run(["features", "inspect", str(tmp_path), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found[0]["problem"] is None and "truncated" in found[1]["problem"]


def test_check_passes_here_and_names_a_wrong_hook(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "features", "check", str(model_path()), str(dictionaries_path()), "--text", str(text),
        "--tokens", "1500", "--layer", "3", "--json",
    ]  # fmt: skip
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["3"]["passed"] and found["3"]["figures"]["fvu"] < 0.1
    assert run([*words, "--hook", "mlp_out.3"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["3"]["alarms"][0]["code"] == "site"


def test_train_stores_a_dictionary_that_check_accepts(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trained"
    words = [
        "features", "train", str(model_path()), "--text", str(text), "--out", str(out),
        "--site", "resid_post.0", "--steps", "60", "--batch", "256", "--tokens", "6000",
        "--held-out", "800", "--k", "16", "--expansion", "2", "--learning-rate", "0.003",
    ]  # fmt: skip
    assert run([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["site"] == "resid_post.0" and 0 < found["fvu"] < 0.5
    assert run(words) == 0  # finished already: shown again
    assert "resid_post.0" in capsys.readouterr().out
    assert run([*words, "--seed", "1"]) == 2
    assert "another run" in capsys.readouterr().err


def test_a_transcoder_is_trained_checked_and_drawn(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trained"
    words = [
        "features", "train", str(model_path()), "--text", str(text), "--out", str(out),
        "--transcoder", "--affine", "--site", "mlp_in.0", "--steps", "60", "--batch", "256",
        "--tokens", "6000", "--held-out", "800", "--k", "16", "--expansion", "2",
        "--learning-rate", "0.003",
    ]  # fmt: skip
    assert run([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["site"] == "mlp_in.0" and 0 < found["fvu"] < 0.5
    assert {"clean", "reconstructed", "zero", "recovered"} == set(found["loss"])
    words = ["features", "check", str(model_path()), str(out), "--text", str(text)]
    assert run([*words, "--tokens", "1500"]) == 0
    assert "mlp_in.0 | writes mlp_out.0" in capsys.readouterr().out
    words = ["graph", "--dictionaries", str(out), "--prompt", "The capital of France is"]
    words += ["--check", "2", "--max-features", "8", "--node-share", "1", "--edge-share", "1"]
    assert run([*words, "--out", str(tmp_path)]) == 0
    assert "checked in the model" in capsys.readouterr().out
    assert run(["features", "train", str(model_path()), "--text", str(text), "--affine"]) == 2
    assert "only a transcoder" in capsys.readouterr().err
