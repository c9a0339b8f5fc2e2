"""Causal mediation: how much of an effect goes through a part of a model, and how much past it."""

from __future__ import annotations

from layerscope.interventions.mediation.effects import Mediation, mediate
from layerscope.interventions.mediation.intervals import Interval, bootstrap

__all__ = ["Interval", "Mediation", "bootstrap", "mediate"]
