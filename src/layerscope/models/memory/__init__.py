"""What a model needs in memory, before any of it is loaded, and where that fits."""

from __future__ import annotations

from layerscope.models.memory.choose import Candidate, Decision, choose, placements
from layerscope.models.memory.estimate import (
    EIGHT_BIT,
    FORMATS,
    FOUR_BIT,
    Estimate,
    Format,
    Workload,
    estimate,
    format_of,
    show_bytes,
)
from layerscope.models.memory.sizes import KvLayer, Sizes, from_name

__all__ = [
    "EIGHT_BIT",
    "FORMATS",
    "FOUR_BIT",
    "Candidate",
    "Decision",
    "Estimate",
    "Format",
    "KvLayer",
    "Sizes",
    "Workload",
    "choose",
    "estimate",
    "format_of",
    "from_name",
    "placements",
    "show_bytes",
]
