"""The heads experiment: scores of every attention head, and an ablation beside random heads."""

from layerscope.experiments.heads.run import HeadsConfig, execute, heads, plan

__all__ = ["HeadsConfig", "execute", "heads", "plan"]
