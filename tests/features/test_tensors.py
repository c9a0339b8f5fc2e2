"""Headers are believed only after they were checked; damaged files are one line."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from layerscope.errors import DictionaryError
from layerscope.features.tensors import open_tensors


def craft(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_are_mapped_not_copied(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {"a": torch.randn(5, 7).to(dtype), "b": torch.arange(3)}
    save_file(stored, tmp_path / "x.safetensors")
    file = open_tensors(tmp_path / "x.safetensors")
    assert file.entry("a").shape == (5, 7) and file.entry("a").nbytes == 35 * dtype.itemsize
    view = file.view("a")
    assert torch.equal(view, stored["a"])
    before = (tmp_path / "x.safetensors").read_bytes()
    view.zero_()  # a private mapping: the file stays
    assert (tmp_path / "x.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": entry(0, 16, [4])}, b"\0" * 12, "truncated"),
        ({"a": entry(0, 16, [4])}, b"\0" * 20, "too long"),
        ({"a": entry(0, 12, [4])}, b"\0" * 12, "16 bytes, but the header gives it 12"),
        ({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, b"\0" * 24, "overlaps"),
        ({"a": entry(4, 20, [4])}, b"\0" * 20, "a gap"),
        ({"a": entry(0, 16, [4], "C64")}, b"\0" * 16, "dtype C64"),
        ({"a": entry(0, 16, [-4])}, b"\0" * 16, "wrongly"),
        ({"a": {"dtype": "F32"}}, b"", "wrongly"),
        ({"a": entry(0, 2**62, [2**60])}, b"", "truncated"),
        (b"[1, 2]", b"", "damaged header"),
        (b"{not json", b"", "damaged header"),
        (b"[" * 50_000, b"", "damaged header"),
    ],
)
def test_lying_headers_are_refused(header: Any, data: bytes, said: str, tmp_path: Path) -> None:
    path = craft(tmp_path / "x.safetensors", header, data)
    with pytest.raises(DictionaryError, match=said) as caught:
        open_tensors(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_header_bomb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(300_000_000)  # sparse: takes no room
    with pytest.raises(DictionaryError, match="claims a header of 200,000,000"):
        open_tensors(path)
    craft(path, b"", length=2**63)
    with pytest.raises(DictionaryError, match="truncated or no safetensors"):
        open_tensors(path)


def test_a_file_larger_than_the_memory_is_opened_and_its_rows_read(tmp_path: Path) -> None:
    path = craft(tmp_path / "x.safetensors", {"W_dec": entry(0, 2**42, [2**30, 2**10])})
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + 2**42)  # sparse: 4 TiB that take no room
    file = open_tensors(path)
    assert file.entry("W_dec").nbytes == 2**42
    assert torch.equal(file.view("W_dec")[[3, 2**30 - 1]], torch.zeros(2, 2**10))


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_members_are_read_by_offset_or_whole(compressed: bool, tmp_path: Path) -> None:
    arrays = {
        "W_enc": np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32),
        "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "one": np.float32(3.0),
    }
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", **arrays)
    file = open_tensors(tmp_path / "x.npz")
    assert (file.entry("W_enc").offset is None) == compressed
    for name, array in arrays.items():
        assert np.array_equal(file.view(name).numpy(), array), name


def test_npz_objects_and_truncation_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", a=np.array([{}], dtype=object))
    with pytest.raises(DictionaryError, match="dtype"):
        open_tensors(tmp_path / "o.npz")
    np.savez(tmp_path / "t.npz", a=np.zeros(100))
    whole = (tmp_path / "t.npz").read_bytes()
    (tmp_path / "t.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DictionaryError, match="truncated"):
        open_tensors(tmp_path / "t.npz")


def test_torch_archives_are_read_without_running_them(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    state = {
        "encoder": {"weight": weight, "turned": weight.T, "part": weight[2:4]},
        "parameter": torch.nn.Parameter(weight.bfloat16()),
        "k": torch.tensor(3),
        "steps": 7,
        "name": "x",
    }
    torch.save(state, tmp_path / "x.pt")
    file = open_tensors(tmp_path / "x.pt")
    assert torch.equal(file.view("encoder.weight"), weight)
    assert torch.equal(file.view("encoder.turned"), weight.T)
    assert torch.equal(file.view("encoder.part"), weight[2:4])
    assert torch.equal(file.view("parameter"), weight.bfloat16())
    assert int(file.view("k")) == 3
    assert file.values == {"steps": 7, "name": "x"}


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/layerscope-was-here",)


def test_pickles_that_run_code_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": Evil()}, tmp_path / "x.pt")
    with pytest.raises(DictionaryError, match=r"system.*save it as safetensors"):
        open_tensors(tmp_path / "x.pt")
    assert not Path("/tmp/layerscope-was-here").exists()
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DictionaryError, match="pickle of the old kind"):
        open_tensors(tmp_path / "old.pt")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100.0)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as archive,
        zipfile.ZipFile(tmp_path / "y.pt", "w") as cut,
    ):
        for member in archive.infolist():
            data = archive.read(member)
            if "/data/" in member.filename:
                data = data[:40]
            cut.writestr(member.filename, data)
    with pytest.raises(DictionaryError, match="beyond its storage"):
        open_tensors(tmp_path / "y.pt")


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="there is no file"):
        open_tensors(tmp_path / "x.safetensors")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DictionaryError, match="no tensor file"):
        open_tensors(tmp_path / "x.bin")
    craft(tmp_path / "y.safetensors", {"W_enc": entry(0, 16, [4])}, b"\0" * 16)
    with pytest.raises(DictionaryError, match="did you mean 'W_enc'"):
        open_tensors(tmp_path / "y.safetensors").view("W_encc")
