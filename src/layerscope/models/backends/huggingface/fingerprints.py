"""Checksums of weights and tokenizers, and the versions that decide a model's numbers."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerscope.models.devices import dtype_name


def hash_files(files: Sequence[Path]) -> str:
    """Return the sha256 of one file, or of the digests of several in the order given."""
    digests = [_hash_file(file) for file in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode("ascii")).hexdigest()


def hash_weights(model: PreTrainedModel) -> str:
    """Return the sha256 over names, types, shapes and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        # Bytes by way of uint8: numpy has no bfloat16.
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of a tokenizer's canonical serialisation.

    Padding and truncation are left out: they are settings of the last call, not of the tokenizer.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {
            "class": type(tokenizer).__name__,
            "vocab": tokenizer.get_vocab(),
        }
    else:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
    specials = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token")}
    text = json.dumps([content, specials], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a model's numbers."""
    packages = ("layerscope", "torch", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in packages
    }


def _hash_file(file: Path) -> str:
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name  # the hub cache stores large files under their sha256
    status = target.stat()
    return _hash_content(target, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _hash_content(file: Path, _mtime_ns: int, _size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
