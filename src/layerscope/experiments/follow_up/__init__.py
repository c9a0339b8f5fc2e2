"""The causal follow-up of a battery: what patches, heads and directions do to confirmed facts."""

from layerscope.experiments.follow_up.config import FollowUpConfig
from layerscope.experiments.follow_up.run import Plan, execute, plan

__all__ = ["FollowUpConfig", "Plan", "execute", "plan"]
