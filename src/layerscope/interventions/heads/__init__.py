"""What attention heads do on repeated random tokens: scores, copying, and an ablation as proof."""

from __future__ import annotations

from layerscope.interventions.heads.ablation import (
    Ablation,
    ablate_heads,
    copying_logprob,
    drops_alone,
)
from layerscope.interventions.heads.copying import copying_scores
from layerscope.interventions.heads.direct import direct_scores
from layerscope.interventions.heads.scores import HeadScores, head_scores
from layerscope.interventions.heads.sequences import Repeated, repeated_tokens

__all__ = [
    "Ablation",
    "HeadScores",
    "Repeated",
    "ablate_heads",
    "copying_logprob",
    "copying_scores",
    "direct_scores",
    "drops_alone",
    "head_scores",
    "repeated_tokens",
]
