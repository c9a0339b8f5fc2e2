"""Lenses: adapters that turn a residual of any layer into vectors that the readout can unembed."""

from __future__ import annotations

from layerscope.lenses.artifacts import load_lens, read_details, save_lens
from layerscope.lenses.base import Lens, NormChoice, NormSource
from layerscope.lenses.find import ALL_LENSES, FoundLens, default_folder, find_lenses
from layerscope.lenses.fitted import (
    BiasLens,
    FittedLens,
    JacobianLens,
    PrismLens,
    TemperatureLens,
    TunedLens,
)
from layerscope.lenses.norm import NormLens
from layerscope.lenses.raw import RawLens
from layerscope.lenses.registry import LENS_NAMES, get_lens
from layerscope.lenses.tuned_lens_library import read_tuned_lens, write_tuned_lens

__all__ = [
    "ALL_LENSES",
    "LENS_NAMES",
    "BiasLens",
    "FittedLens",
    "FoundLens",
    "JacobianLens",
    "Lens",
    "NormChoice",
    "NormLens",
    "NormSource",
    "PrismLens",
    "RawLens",
    "TemperatureLens",
    "TunedLens",
    "default_folder",
    "find_lenses",
    "get_lens",
    "load_lens",
    "read_details",
    "read_tuned_lens",
    "save_lens",
    "write_tuned_lens",
]
