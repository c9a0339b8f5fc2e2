"""Path patching over sets of prompt pairs: which parts speak to which, with plan and resume."""

from __future__ import annotations

from layerscope.experiments.path_patching.config import PathConfig
from layerscope.experiments.path_patching.run import PathPlan, execute, path_patch, plan

__all__ = ["PathConfig", "PathPlan", "execute", "path_patch", "plan"]
