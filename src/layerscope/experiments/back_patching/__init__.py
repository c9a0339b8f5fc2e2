"""Back-patching over sets of prompts: later residuals put into earlier blocks, beside controls."""

from __future__ import annotations

from layerscope.experiments.back_patching.config import BackPatchConfig
from layerscope.experiments.back_patching.run import BackPatchPlan, back_patch, execute, plan

__all__ = ["BackPatchConfig", "BackPatchPlan", "back_patch", "execute", "plan"]
