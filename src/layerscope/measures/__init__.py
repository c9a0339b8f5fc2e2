"""Milestones, checks and guidance: pure functions on the typed table of per-layer rows.

Nothing here knows torch or a model, so a table that someone else published can be measured too:

    table = LayersTable.read_parquet(path)    # what a run wrote
    table = read_published(path)              # or the earlier system's CSV
    summary = summarise(table, MeasureConfig(copy_threshold=0.9)).to_dict()

`LayersTable` holds the rows and what is known of the prompts, `MeasureConfig` every threshold,
`Summary` all milestones, checks and the guidance. `with_copy_flags` adds the flags of the echo
detectors as columns. The submodule `compat` shows a summary under published names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerscope.measures.config import MeasureConfig
    from layerscope.measures.copy import with_copy_flags
    from layerscope.measures.published import read_published
    from layerscope.measures.summary import Summary, summarise
    from layerscope.measures.table import LayersTable

# Loaded when first asked for: `tokens` alone must cost neither polars nor numpy.
_HOMES: dict[str, str] = {
    "LayersTable": "layerscope.measures.table",
    "MeasureConfig": "layerscope.measures.config",
    "Summary": "layerscope.measures.summary",
    "read_published": "layerscope.measures.published",
    "summarise": "layerscope.measures.summary",
    "with_copy_flags": "layerscope.measures.copy",
}

__all__ = [
    "LayersTable",
    "MeasureConfig",
    "Summary",
    "read_published",
    "summarise",
    "with_copy_flags",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home the first time it is asked for (PEP 562)."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'layerscope.measures' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
