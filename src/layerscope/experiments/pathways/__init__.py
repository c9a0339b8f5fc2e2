"""Feature pathways from raw data to the integrated graph: audit, select, discover, replay, join.

work = Workspace(read_config("pathways.yaml"), Path("pathways-run"))
code, stages = run_all(work)
"""

from __future__ import annotations

from layerscope.experiments.pathways.config import PathwaysConfig, read_config, source_compat_of
from layerscope.experiments.pathways.memory import plan
from layerscope.experiments.pathways.orchestrate import NAMES, StageRun, run_all, run_stage
from layerscope.experiments.pathways.results import Results, open_results
from layerscope.experiments.pathways.workspace import Workspace

__all__ = [
    "NAMES",
    "PathwaysConfig",
    "Results",
    "StageRun",
    "Workspace",
    "open_results",
    "plan",
    "read_config",
    "run_all",
    "run_stage",
    "source_compat_of",
]
