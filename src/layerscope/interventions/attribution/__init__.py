"""Gradient approximations of patching, and how far each can be believed."""

from __future__ import annotations

from layerscope.interventions.attribution.contrast import (
    AnswerProbability,
    Contrast,
    LogitDifference,
    Metric,
)
from layerscope.interventions.attribution.edges import (
    Edge,
    EdgeScores,
    Receiver,
    edge_attribution,
)
from layerscope.interventions.attribution.exact import exact_effects, joint_effect
from layerscope.interventions.attribution.gradient import (
    attribution_patching,
    integrated_gradients,
)
from layerscope.interventions.attribution.nodes import Node, NodeScores, resolve_sites
from layerscope.interventions.attribution.paths import exact_edges
from layerscope.interventions.attribution.star import atp_star, saturated_heads
from layerscope.interventions.attribution.verify import Verification, metric_linearity, verify

__all__ = [
    "AnswerProbability",
    "Contrast",
    "Edge",
    "EdgeScores",
    "LogitDifference",
    "Metric",
    "Node",
    "NodeScores",
    "Receiver",
    "Verification",
    "atp_star",
    "attribution_patching",
    "edge_attribution",
    "exact_edges",
    "exact_effects",
    "integrated_gradients",
    "joint_effect",
    "metric_linearity",
    "resolve_sites",
    "saturated_heads",
    "verify",
]
