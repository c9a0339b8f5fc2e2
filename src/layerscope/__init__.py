"""layerscope looks inside language models and tells its user whether to believe what it sees.

Importing this package is cheap: torch and transformers load only when something needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerscope.allocator import keep_freed_memory
    from layerscope.experiments.layers import LayersConfig, LayersResult, PromptSet, analyze
    from layerscope.lenses import get_lens
    from layerscope.measures.summary import summarise
    from layerscope.measures.table import LayersTable
    from layerscope.models import LanguageModel, Prompt, Site, TokenBatch, load
    from layerscope.readout import readout

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    "keep_freed_memory": "layerscope.allocator",
    "load": "layerscope.models",
    "LanguageModel": "layerscope.models",
    "Site": "layerscope.models",
    "Prompt": "layerscope.models",
    "TokenBatch": "layerscope.models",
    "readout": "layerscope.readout",
    "get_lens": "layerscope.lenses",
    "LayersTable": "layerscope.measures.table",
    "summarise": "layerscope.measures.summary",
    "analyze": "layerscope.experiments.layers",
    "LayersConfig": "layerscope.experiments.layers",
    "LayersResult": "layerscope.experiments.layers",
    "PromptSet": "layerscope.experiments.layers",
}

__all__ = [
    "LanguageModel",
    "LayersConfig",
    "LayersResult",
    "LayersTable",
    "Prompt",
    "PromptSet",
    "Site",
    "TokenBatch",
    "__version__",
    "analyze",
    "get_lens",
    "keep_freed_memory",
    "load",
    "readout",
    "summarise",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home the first time it is asked for (PEP 562)."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'layerscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
