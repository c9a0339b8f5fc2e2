"""What turns pre-activations into features: one small file per family."""

from __future__ import annotations

from layerscope.features.architectures.base import Gate
from layerscope.features.architectures.gated import Gated
from layerscope.features.architectures.jumprelu import JumpRelu
from layerscope.features.architectures.relu import Relu
from layerscope.features.architectures.topk import BatchTopK, GroupMax, TopK

__all__ = ["BatchTopK", "Gate", "Gated", "GroupMax", "JumpRelu", "Relu", "TopK"]
