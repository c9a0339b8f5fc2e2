"""Tensors in files, read by header and by row: safetensors, npz, and torch archives."""

from __future__ import annotations

from layerscope.features.tensors.files import Entry, TensorFile, open_tensors

__all__ = ["Entry", "TensorFile", "open_tensors"]
