"""Checks of a layers run that need the model again: is what the table says to be believed?"""

from layerscope.experiments.layers.diagnostics.entry import SECTIONS, diagnose
from layerscope.experiments.layers.diagnostics.settings import LEVELS, Settings

__all__ = ["LEVELS", "SECTIONS", "Settings", "diagnose"]
