"""Activation patching and causal tracing over sets of prompts, with tables, plan and resume."""

from __future__ import annotations

from layerscope.experiments.patching.config import PatchConfig
from layerscope.experiments.patching.facts import Fact, read_facts
from layerscope.experiments.patching.files import read_pairs
from layerscope.experiments.patching.run import PatchPlan, execute, patch, plan
from layerscope.experiments.patching.trace import (
    TraceConfig,
    TracePlan,
    execute_trace,
    plan_trace,
)

__all__ = [
    "Fact",
    "PatchConfig",
    "PatchPlan",
    "TraceConfig",
    "TracePlan",
    "execute",
    "execute_trace",
    "patch",
    "plan",
    "plan_trace",
    "read_facts",
    "read_pairs",
]
