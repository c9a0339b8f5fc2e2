"""Which features differ between two groups of prompts, and which of them change decisions."""

from __future__ import annotations

from layerscope.experiments.causal_features.config import CausalConfig
from layerscope.experiments.causal_features.task import Game, Task, demo_task, read_task

__all__ = ["CausalConfig", "Game", "Task", "demo_task", "read_task"]
