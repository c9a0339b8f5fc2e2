"""Tiny models saved once per process and loaded by Hugging Face and by MLX."""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import layerscope
from layerscope.models import LanguageModel
from support.tiny_models import tiny, tiny_tokenizer

# What mlx-lm's code fixes is set accordingly in the configuration of both.
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma3": {"hidden_size": 64},  # a scale of 8, which bfloat16 holds
    "gpt2": {"n_inner": None},
    "gpt_neox": {"intermediate_size": 128, "hidden_act": "gelu_new"},
    "gpt_neox_sequential": {"intermediate_size": 128, "hidden_act": "gelu_new"},
}
FAMILIES = (
    "llama",
    "llama_biased",
    "llama_tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
    "phi3",
    "olmo2",
    "mixtral",
    "qwen3_moe",
)
FOUR = ("llama", "qwen3", "gemma2", "gpt2")


def mlx() -> Any:
    """Return the module mlx.core, or skip."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'layerscope[mlx]'")
    return pytest.importorskip("mlx.core", reason="MLX has no build for this machine")


@cache
def folder(family: str, **overrides: Any) -> Path:
    """Return the folder of a tiny model and its tokenizer."""
    path = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    tiny(family, **{**OVERRIDES.get(family, {}), **overrides}).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@cache
def in_mlx(family: str) -> LanguageModel:
    """Return the tiny model of a family in MLX; shared, so leave it as you found it."""
    mlx()
    return layerscope.load(folder(family), backend="mlx")


@cache
def in_hugging_face(family: str) -> LanguageModel:
    """Return the same weights in Hugging Face."""
    return layerscope.load(folder(family))


def native(model: LanguageModel) -> Any:
    """Return the mlx-lm model behind a `LanguageModel`."""
    return model.backend.model  # type: ignore[attr-defined]


def state_of(model: Any) -> str:
    """Return a digest of everything a run must leave alone: tree, classes, names, arrays."""
    import numpy as np
    from mlx import nn

    digest = hashlib.sha256()
    for name, module in sorted(model.named_modules(), key=lambda pair: pair[0]):
        own = vars(module)
        kept = sorted(f"{key} {value!r}" for key, value in own.items() if not _is_module(value, nn))
        digest.update(f"{name} {id(module)} {id(type(module))} {kept}".encode())
        names = type(module).__call__.__globals__
        digest.update(f"{id(names.get('scaled_dot_product_attention'))}".encode())
        for key, value in sorted(module.items()):
            digest.update(f"{key} {type(value).__name__}".encode())
            if type(value).__name__ == "array":
                digest.update(np.array(value.astype(mlx().float32)).tobytes())
    return digest.hexdigest()


def _is_module(value: Any, nn: Any) -> bool:
    return isinstance(value, nn.Module)
