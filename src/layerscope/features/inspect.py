"""What lies in a folder of dictionaries, by headers alone: no weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerscope.errors import DictionaryError
from layerscope.features.formats.base import Found
from layerscope.features.formats.registry import FORMATS, detect
from layerscope.features.tensors import TensorFile, open_tensors
from layerscope.features.tensors.files import SUFFIXES

CONFIGS = ("cfg.json", "config.json", "hyperparams.json", "config.yaml", "conf.yaml")


@dataclass(frozen=True)
class Header:
    """One dictionary by its header.

    Attributes:
        found: format, path, layer.
        file: its tensors; None where it has no readable file.
        problem: why it cannot be used, if so.
    """

    found: Found
    file: TensorFile | None
    problem: str | None = None

    @property
    def features(self) -> int | None:
        """Number of features, by the length of the encoder's bias or of a decoder."""
        return _features(self.file) if self.file else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.nbytes for entry in self.file.entries.values()) if self.file else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the header as JSON values."""
        tensors = self.file.entries.values() if self.file else ()
        return {
            "format": self.found.format,
            "path": str(self.found.path),
            "layer": self.found.layer,
            "label": self.found.label,
            "features": self.features,
            "bytes": self.nbytes,
            "tensors": [
                {
                    "name": entry.name,
                    "dtype": str(entry.dtype).removeprefix("torch."),
                    "shape": list(entry.shape),
                }
                for entry in tensors
            ],
            "problem": self.problem,
        }


def inspect(path: str | Path, *, format: str | None = None) -> list[Header]:
    """Return the headers of the dictionaries in a folder or file.

    A damaged file is reported with its problem; the others are still listed.

    Raises:
        DictionaryError: nothing is recognised.
    """
    return [_header(found) for found in detect(path, format=format)]


def titles() -> dict[str, str]:
    """Return what every format is called, by code."""
    return {each.code: each.title for each in FORMATS}


def _header(found: Found) -> Header:
    try:
        path = next(_files(found.path))
        return Header(found, open_tensors(path))
    except StopIteration:
        return Header(found, None, "there are no weights")
    except DictionaryError as error:
        return Header(found, None, str(error))


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    paths = [each for each in sorted(path.rglob("*")) if each.suffix in SUFFIXES]
    yield from sorted(paths, key=lambda each: each.name.startswith("sparsity"))


def _features(file: TensorFile) -> int | None:
    biases = ("b_enc", "encoder.bias", "b_E", "encoder_linear.bias", "b_gate", "gate_bias")
    for name, entry in file.entries.items():
        bare = name.removeprefix("sae.")
        if bare in biases or bare.startswith("b_enc_"):
            return entry.shape[-1]
    return file.entries["D"].shape[0] if "D" in file else None
