"""Which formats there are, and which one a folder holds."""

from __future__ import annotations

from pathlib import Path

from layerscope.errors import DictionaryError, nearest
from layerscope.features.formats.base import Format, Found
from layerscope.features.formats.circuit_tracer import CircuitTracer
from layerscope.features.formats.deepseek_r1 import DeepSeekR1
from layerscope.features.formats.dictionary_learning import DictionaryLearning
from layerscope.features.formats.gemma_scope import GemmaScope
from layerscope.features.formats.gemma_scope_2 import GemmaScope2
from layerscope.features.formats.goodfire import Goodfire
from layerscope.features.formats.llama_scope import LlamaScope
from layerscope.features.formats.llama_scope_r1 import LlamaScopeR1
from layerscope.features.formats.llamascopium import Llamascopium
from layerscope.features.formats.qwen_scope import QwenScope
from layerscope.features.formats.saelens import SaeLens
from layerscope.features.formats.sparsify import Sparsify
from layerscope.features.formats.temporal import TemporalSae

# In this order folders are tried; what is told by the contents of its files comes last.
FORMATS: tuple[Format, ...] = (
    SaeLens(),
    GemmaScope(),
    GemmaScope2(),
    LlamaScope(),
    LlamaScopeR1(),
    Llamascopium(),
    Sparsify(),
    DictionaryLearning(),
    CircuitTracer(),
    QwenScope(),
    Goodfire(),
    DeepSeekR1(),
    TemporalSae(),
)


def format_of(name: str) -> Format:
    """Return a format by its code or name.

    Raises:
        DictionaryError: there is none of this name.
    """
    for each in FORMATS:
        if name.lower() in (each.code.lower(), each.name):
            return each
    names = [each.name for each in FORMATS]
    raise DictionaryError(
        f"unknown dictionary format '{name}'{nearest(name, names)}; known: {', '.join(names)}"
    )


def detect(path: str | Path, *, format: str | None = None) -> list[Found]:
    """Return the dictionaries in a folder or file, by layer; only names and headers are read.

    Args:
        path: a folder, at or below which dictionaries lie, or one file.
        format: look for this one only; None tries all.

    Raises:
        DictionaryError: there is nothing that any format recognises.
    """
    path = Path(path)
    if not path.exists():
        raise DictionaryError(f"there is no {path}")
    tried = FORMATS if format is None else (format_of(format),)
    for each in tried:
        found = each.find(path)
        if found:
            return sorted(found, key=lambda one: (one.layer is None, one.layer or 0, one.label))
    names = ", ".join(each.name for each in tried)
    raise DictionaryError(f"{path} holds no dictionary of a format that was looked for ({names})")
