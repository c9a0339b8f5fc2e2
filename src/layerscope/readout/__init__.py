"""Readout: hidden states to statistics over the vocabulary, in one streaming pass."""

from __future__ import annotations

from layerscope.readout.unembedding import Unembedding

__all__ = ["Unembedding"]
