"""The layers experiment: what a causal language model thinks at every layer, and how sure that is.

`analyze(model)` runs the built-in suite; `plan` and `execute` are its two halves, for callers that
want to check everything first or to keep finished work units.
"""

from layerscope.experiments.layers.config import LayersConfig
from layerscope.experiments.layers.prompts import Fact, PromptSet
from layerscope.experiments.layers.run import (
    LayersResult,
    Plan,
    analyze,
    execute,
    plan,
)
from layerscope.experiments.units import Progress, UnitStore

__all__ = [
    "Fact",
    "LayersConfig",
    "LayersResult",
    "Plan",
    "Progress",
    "PromptSet",
    "UnitStore",
    "analyze",
    "execute",
    "plan",
]
