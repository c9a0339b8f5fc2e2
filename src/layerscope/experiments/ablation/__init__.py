"""Ablations over sets of prompts: what an answer needs, beside disturbances of the same size."""

from __future__ import annotations

from layerscope.experiments.ablation.config import AblationConfig
from layerscope.experiments.ablation.run import AblationPlan, ablate, execute, plan

__all__ = ["AblationConfig", "AblationPlan", "ablate", "execute", "plan"]
