"""The mediation experiment: total, direct and indirect effects, with intervals over pairs."""

from layerscope.experiments.mediation.run import MediationConfig, execute, mediation, plan

__all__ = ["MediationConfig", "execute", "mediation", "plan"]
