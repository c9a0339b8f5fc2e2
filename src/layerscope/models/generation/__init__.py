"""Generation: a model continues its prompts, with edits, from stored keys and values."""

from __future__ import annotations

from layerscope.models.generation.result import FinishReason, Generation, Piece, Stream
from layerscope.models.generation.sampling import Sampling
from layerscope.models.generation.text import Detokeniser, StopStrings

__all__ = [
    "Detokeniser",
    "FinishReason",
    "Generation",
    "Piece",
    "Sampling",
    "StopStrings",
    "Stream",
]
