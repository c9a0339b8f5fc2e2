"""``layerscope fit`` says before loading what a model needs and where it fits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerscope.cli.app import run
from layerscope.models.backends.huggingface import lookup
from layerscope.models.backends.huggingface.lookup import find_sizes
from layerscope.models.devices import Device
from layerscope.models.memory import report
from support.tiny_models import tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama_tied").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_reachable", lambda: False)


def fitted(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert run(["fit", *words, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def here(monkeypatch: pytest.MonkeyPatch, *devices: Device) -> None:
    monkeypatch.setattr(report, "present", lambda: devices)


def test_what_a_folder_needs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fitted(capsys, str(folder), "--batch", "2", "--positions", "10")
    model = tiny("llama_tied")
    count = sum(tensor.numel() for tensor in model.parameters())
    assert found["origin"] == "files"
    assert found["parameters"]["total"] == count
    assert found["parameters"]["tied"] is True
    assert found["parameters"]["stored"] == {"F32": count}
    needs = {need["format"]: need for need in found["needs"]}
    assert needs["float32"]["weights"] == 4 * count
    assert needs["bfloat16"]["weights"] == 2 * count
    # 3 layers, 2 key-value heads of width 8, keys and values, 2 x 10 tokens, 4 bytes.
    assert needs["float32"]["kv_cache"] == 3 * 2 * 8 * 2 * 20 * 4
    best = found["recommended"]
    assert best["needed"] < best["free"] and best["reason"]


def test_the_long_form_is_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = fitted(capsys, "--batch", "3", str(folder))
    assert run(["fit", "memory", str(folder), "--batch", "3", "--json"]) == 0
    long = json.loads(capsys.readouterr().out)
    assert long["needs"] == short["needs"]


def test_the_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert run(["fit", str(folder), "--positions", "16"]) == 0
    out = capsys.readouterr().out
    for words in ("35,552 parameters", "tied, counted once", "1 x 16 tokens", "recommended: "):
        assert words in out


def test_no_weights_are_needed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    found = fitted(capsys, str(tmp_path))
    assert found["origin"] == "configuration"
    assert found["parameters"]["total"] == 35552


def test_no_weight_is_read(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    file = path / "model.safetensors"
    content = file.read_bytes()
    tensors = sum(tensor.nbytes for tensor in load_file(file).values())
    file.unlink()
    with file.open("wb") as stream:  # a hole in place of the weights
        stream.write(content[:-tensors])
        stream.truncate(len(content))
    assert find_sizes(str(path)).parameters == find_sizes(str(folder)).parameters


@pytest.mark.parametrize(
    ("name", "total"),
    [("EleutherAI/pythia-160m", 160e6), ("Qwen/Qwen2.5-0.5B", 5e8), ("a/Moe-8x7B", 46.6e9)],
)
def test_only_a_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, total: float
) -> None:
    here(monkeypatch, Device("cuda:0", 2**40, 2**40, torch.bfloat16))
    found = fitted(capsys, name)
    assert found["origin"] == "name"
    assert found["parameters"]["total"] == pytest.approx(total, rel=0.01)
    assert run(["fit", name]) == 0
    assert "an estimate from its name alone" in capsys.readouterr().out


def test_nothing_fits(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here(
        monkeypatch,
        Device("cuda:0", 24 * 2**30, 12 * 2**30, torch.bfloat16),
        Device("cpu", 2**34, 2**30, torch.float32),
    )
    found = fitted(capsys, "someone/big-13b", code=2)
    assert found["recommended"] is None
    assert any("4 bit on cuda:0" in way for way in found["would_fit"])
    assert run(["fit", "someone/big-13b"]) == 2
    out = capsys.readouterr().out
    assert "more than is free" in out and "would fit: 4 bit on cuda:0" in out


def test_a_device_and_a_dtype_narrow_the_choice(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here(
        monkeypatch,
        Device("cuda:0", 2**36, 2**36, torch.bfloat16),
        Device("cpu", 2**36, 2**36, torch.float32),
    )
    assert fitted(capsys, str(folder))["recommended"]["device"] == "cuda:0"
    best = fitted(capsys, str(folder), "--device", "cpu", "--dtype", "fp16")["recommended"]
    assert (best["device"], best["format"], best["reason"]) == ("cpu", "float16", "asked for")


def test_two_cards_hold_what_one_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [Device(f"cuda:{index}", 2**35, 20 * 2**30, torch.bfloat16) for index in (0, 1)]
    here(monkeypatch, *cards, Device("cpu", 2**35, 2**30, torch.float32))
    best = fitted(capsys, "someone/model-13b")["recommended"]
    assert (best["device"], best["format"]) == ("cuda:0+cuda:1", "bfloat16")
    assert run(["fit", "someone/model-13b"]) == 0
    assert "device_map='auto'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["./absent"], "there is no folder"),
        (["gpt2"], "its name says no number"),
        (["TINY", "--positions", "4096"], "beyond the context"),
        (["TINY", "--batch", "0"], "--batch"),
        (["TINY", "--device", "tpu"], "unknown device"),
        (["TINY", "--dtype", "float33"], "unknown dtype"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run(["fit", *(str(folder) if word == "TINY" else word for word in words)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_other_formats_are_recognised(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    packing = {"quantization": {"group_size": 64, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config | packing))
    assert run(["fit", str(tmp_path)]) == 2
    assert "backend='mlx'" in capsys.readouterr().err


class TestHub:
    """The hub is never asked: its answers are made up here."""

    def test_only_the_configuration_and_the_headers_are_fetched(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        shutil.copy(folder / "config.json", tmp_path)

        def download(repo: str, name: str, revision: str | None) -> str:
            asked.append(name)
            return str(tmp_path / name)

        tensor = SimpleNamespace(dtype="BF16", shape=[35552], data_offsets=(0, 2 * 35552))
        file = SimpleNamespace(tensors={"all": tensor})
        metadata = SimpleNamespace(files_metadata={"model.safetensors": file})
        monkeypatch.setattr(lookup, "_reachable", lambda: True)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        monkeypatch.setattr(
            "huggingface_hub.get_safetensors_metadata", lambda repo, revision: metadata
        )
        sizes = find_sizes("someone/not-cached")
        assert asked == ["config.json"]
        assert (sizes.origin, sizes.parameters) == ("files", 35552)
        assert sizes.stored == {"BF16": 35552}

    def test_a_snapshot_in_the_cache_is_used(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "huggingface_hub.try_to_load_from_cache",
            lambda repo, name, revision: str(folder / name),
        )
        assert find_sizes("someone/cached").origin == "files"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "from layerscope.cli.app import run; import sys\n"
        "assert run(['fit', 'memory', '--help']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
