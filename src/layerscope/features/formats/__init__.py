"""The thirteen ways in which sparse dictionaries are stored, one file each."""

from __future__ import annotations

from layerscope.features.formats.base import Format, Found, LoadOptions, Raw
from layerscope.features.formats.registry import FORMATS, detect, format_of
from layerscope.features.formats.write import write_dictionary

__all__ = [
    "FORMATS",
    "Format",
    "Found",
    "LoadOptions",
    "Raw",
    "detect",
    "format_of",
    "write_dictionary",
]
