"""Activation patching, exact and fast: cells that start where they first differ from a stored run.

model = layerscope.load("some/model")
pair = tokenize_pair(model, PromptPair(key="fr", clean=..., corrupt=..., answers=(" Paris",), ...))
nodes = nodes_of(model, pair, "resid_pre")
values = sweep(model, pair, nodes, ["logit_diff"])
"""

from __future__ import annotations

from layerscope.interventions.patching.cells import Cell, Patch, site_of
from layerscope.interventions.patching.engine import run_cells
from layerscope.interventions.patching.metrics import (
    METRICS,
    Metric,
    Reader,
    Targets,
    custom_metric,
    metric_of,
    recovery,
)
from layerscope.interventions.patching.naive import naive_cells
from layerscope.interventions.patching.pairs import (
    Direction,
    Place,
    PromptPair,
    TokenPair,
    batch_of,
    tokenize_pair,
    tokenize_pairs,
)
from layerscope.interventions.patching.planner import (
    NO_COST,
    Cost,
    Speed,
    calibrate,
    check_budget,
    cost_of,
    cost_of_cells,
)
from layerscope.interventions.patching.recording import Recording, record
from layerscope.interventions.patching.sweeps import (
    KINDS,
    Node,
    Runs,
    Values,
    Where,
    nodes_of,
    record_pair,
    sites_of_kind,
    sweep,
)
from layerscope.interventions.patching.tiles import DEFAULT_BUDGET

__all__ = [
    "DEFAULT_BUDGET",
    "KINDS",
    "METRICS",
    "NO_COST",
    "Cell",
    "Cost",
    "Direction",
    "Metric",
    "Node",
    "Patch",
    "Place",
    "PromptPair",
    "Reader",
    "Recording",
    "Runs",
    "Speed",
    "Targets",
    "TokenPair",
    "Values",
    "Where",
    "batch_of",
    "calibrate",
    "check_budget",
    "cost_of",
    "cost_of_cells",
    "custom_metric",
    "metric_of",
    "naive_cells",
    "nodes_of",
    "record",
    "record_pair",
    "recovery",
    "run_cells",
    "site_of",
    "sites_of_kind",
    "sweep",
    "tokenize_pair",
    "tokenize_pairs",
]
