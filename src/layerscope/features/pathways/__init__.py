"""Feature pathways: which earlier features drive a feature, and what a replay says of it.

state = PromptState.of(model, prompt, dictionaries, targets)   # one forward, dictionaries read once
edges = discover(state)                                        # gradients, swept once
edges, doses = judge(state, edges, replay(state, edges))       # every edge carried out
"""

from __future__ import annotations

from layerscope.features.pathways.discover import DiscoverOptions, discover
from layerscope.features.pathways.graph import attribution_graph
from layerscope.features.pathways.graph_base import AttributionGraph
from layerscope.features.pathways.graph_checks import agreement_of, check_graph
from layerscope.features.pathways.pruning import GraphOptions
from layerscope.features.pathways.pullback import Pullback, Variant
from layerscope.features.pathways.replay import DOSES, Measured, ReplayOptions, replay
from layerscope.features.pathways.state import (
    ActiveFeatures,
    PromptState,
    Target,
    TargetState,
    active_features,
)
from layerscope.features.pathways.verdicts import VERDICTS, agreement, judge

__all__ = [
    "DOSES",
    "VERDICTS",
    "ActiveFeatures",
    "AttributionGraph",
    "DiscoverOptions",
    "GraphOptions",
    "Measured",
    "PromptState",
    "Pullback",
    "ReplayOptions",
    "Target",
    "TargetState",
    "Variant",
    "active_features",
    "agreement",
    "agreement_of",
    "attribution_graph",
    "check_graph",
    "discover",
    "judge",
    "replay",
]
