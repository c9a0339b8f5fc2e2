"""Circuits: the edges kept by their score, and how much of the behaviour they carry."""

from __future__ import annotations

from layerscope.interventions.circuits.curve import (
    FRACTIONS,
    Faithfulness,
    faithfulness_curve,
)
from layerscope.interventions.circuits.graph import Circuit, keep_edges
from layerscope.interventions.circuits.run import circuit_metric

__all__ = [
    "FRACTIONS",
    "Circuit",
    "Faithfulness",
    "circuit_metric",
    "faithfulness_curve",
    "keep_edges",
]
