"""The attribution graph of one prompt as an experiment: tables, summary, and the viewer's file."""

from layerscope.experiments.attribution_graph.run import GraphPlan, execute, plan
from layerscope.experiments.attribution_graph.viewer import viewer_graph

__all__ = ["GraphPlan", "execute", "plan", "viewer_graph"]
