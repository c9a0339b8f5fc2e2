"""The steering experiment: a direction from contrasts, its dose and response, beside controls."""

from layerscope.experiments.steering.config import SteeringConfig
from layerscope.experiments.steering.run import execute, plan, steering

__all__ = ["SteeringConfig", "execute", "plan", "steering"]
