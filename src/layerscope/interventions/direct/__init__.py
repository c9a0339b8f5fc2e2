"""Direct logit attribution: who wrote a logit into the residual stream."""

from __future__ import annotations

from layerscope.interventions.direct.attribution import (
    DirectAttribution,
    direct_logit_attribution,
)
from layerscope.interventions.direct.sources import neuron_attribution, source_attribution

__all__ = [
    "DirectAttribution",
    "direct_logit_attribution",
    "neuron_attribution",
    "source_attribution",
]
