"""Gradient approximations of patching, and how far each can be believed."""

from __future__ import annotations

from layerscope.interventions.attribution.contrast import (
    AnswerProbability,
    Contrast,
    LogitDifference,
    Metric,
)
from layerscope.interventions.attribution.exact import exact_effects, joint_effect
from layerscope.interventions.attribution.gradient import (
    attribution_patching,
    integrated_gradients,
)
from layerscope.interventions.attribution.nodes import Node, NodeScores, resolve_sites

__all__ = [
    "AnswerProbability",
    "Contrast",
    "LogitDifference",
    "Metric",
    "Node",
    "NodeScores",
    "attribution_patching",
    "exact_effects",
    "integrated_gradients",
    "joint_effect",
    "resolve_sites",
]
