"""Activation patching and causal tracing over sets of prompts, with tables, plan and resume."""

from __future__ import annotations

from layerscope.experiments.patching.config import PatchConfig
from layerscope.experiments.patching.files import read_pairs
from layerscope.experiments.patching.run import PatchPlan, execute, patch, plan

__all__ = ["PatchConfig", "PatchPlan", "execute", "patch", "plan", "read_pairs"]
