"""Features: sparse dictionaries over activations, and what reads and edits them.

dictionaries = open_set("my-dictionaries")          # headers only
dictionary = dictionaries[3].load()                 # layer 3 into memory
print(dictionary.convention)                        # how the file was read, in one line
values = dictionary.encode(residual)                # [..., features], float32, differentiable
"""

from __future__ import annotations

from layerscope.features.conventions import Convention
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.edits import (
    FeatureEdit,
    ablate_features,
    clamp_features,
    scale_features,
    set_features,
)
from layerscope.features.formats import LoadOptions, detect, write_dictionary
from layerscope.features.library import DictionarySet, load, open_set
from layerscope.features.matrices import Matrix
from layerscope.features.spaces import FeatureId, FeatureSpace, join, residual_coordinates

__all__ = [
    "Convention",
    "DictionarySet",
    "FeatureEdit",
    "FeatureId",
    "FeatureSpace",
    "LoadOptions",
    "Matrix",
    "SparseDictionary",
    "ablate_features",
    "clamp_features",
    "detect",
    "join",
    "load",
    "open_set",
    "residual_coordinates",
    "scale_features",
    "set_features",
    "write_dictionary",
]
