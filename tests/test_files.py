from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import polars as pl
import pytest

from layerscope import files
from layerscope.errors import OutputError


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_and_folders_are_made(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    files.write_text(target, "⟨NEXT⟩\n")
    assert target.read_bytes() == "⟨NEXT⟩\n".encode()
    assert listing(target.parent) == ["b.txt"]


def test_an_exception_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    def full(*_args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OutputError, match=r"no space left writing .*x\.txt; free space or choose"):
        files.write_text(tmp_path / "x.txt", "text")
    assert listing(tmp_path) == []


def test_a_full_disk_seen_by_polars_is_the_same_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="no space left"),
        files.atomic_path(tmp_path / "x.parquet"),
    ):
        raise pl.exceptions.ComputeError(
            "parquet: File out of specification: underlying IO error: "
            "No space left on device (os error 28)"
        )


def test_an_error_that_is_no_write_failure_passes_through(tmp_path: Path) -> None:
    with pytest.raises(pl.exceptions.ColumnNotFoundError), files.atomic_path(tmp_path / "x"):
        raise pl.exceptions.ColumnNotFoundError("a")


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --out"):
        files.write_text(tmp_path / "file" / "x.txt", "text")


def test_json_holds_no_nan(tmp_path: Path) -> None:
    path = files.write_json(tmp_path / "x.json", {"a": float("nan"), "b": (1, float("inf"), "→")})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1, None, "→"]}
    assert "→" in text


def test_finite_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        files.finite({"a": object()})


def test_canonical_json_knows_no_order_of_keys() -> None:
    assert files.canonical_json({"b": 1, "a": (2,)}) == files.canonical_json({"a": [2], "b": 1})
    assert files.canonical_json({"a": 1}) != files.canonical_json({"a": 2})


def test_only_temporaries_of_dead_processes_are_removed(tmp_path: Path) -> None:
    files.write_text(tmp_path / "sub" / "keep.txt", "x")
    with files.atomic_path(tmp_path / "sub" / "a.txt") as path:
        path.write_text("being written")
        dead = path.with_name(path.name.replace(f"{os.getpid()}-", "999999999-"))
        dead.write_text("left by a killed process")
        assert files.remove_temporaries(tmp_path) == 1
        assert not dead.exists()
    assert listing(tmp_path / "sub") == ["a.txt", "keep.txt"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Meta-Llama-3-8B", "Meta-Llama-3-8B"),
        ("/data/models/tiny/", "tiny"),
        ("gpt2", "gpt2"),
        ("a/b:c d?", "b_c_d_"),
        ("..", "model"),
        ("", "model"),
        ("C:\\models\\tiny", "tiny"),
    ],
)
def test_safe_name(model: str, name: str) -> None:
    assert files.safe_name(model) == name
