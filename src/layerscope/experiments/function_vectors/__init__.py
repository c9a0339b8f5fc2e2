"""The function-vector experiment: which heads carry a task, and what their vector does."""

from layerscope.experiments.function_vectors.config import FunctionVectorConfig
from layerscope.experiments.function_vectors.run import execute, function_vectors, plan

__all__ = ["FunctionVectorConfig", "execute", "function_vectors", "plan"]
