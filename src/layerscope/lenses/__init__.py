"""Lenses: adapters that turn a residual of any layer into vectors that the readout can unembed."""

from __future__ import annotations

from layerscope.lenses.base import Lens, NormChoice, NormSource
from layerscope.lenses.norm import NormLens
from layerscope.lenses.raw import RawLens
from layerscope.lenses.registry import LENS_NAMES, get_lens

__all__ = ["LENS_NAMES", "Lens", "NormChoice", "NormLens", "NormSource", "RawLens", "get_lens"]
