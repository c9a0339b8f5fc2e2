"""The attribution experiment: nodes and edges by gradients, verified, and the circuit they give."""

from layerscope.experiments.attribution.config import AttributionConfig
from layerscope.experiments.attribution.run import attribution, execute, plan

__all__ = ["AttributionConfig", "attribution", "execute", "plan"]
