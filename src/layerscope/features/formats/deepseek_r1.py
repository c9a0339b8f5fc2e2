"""F12: DeepSeek-R1 dictionaries of qresearch. One torch file, ReLU, no pre-bias."""

from __future__ import annotations

from layerscope.features.formats.linear_modules import LinearModules


class DeepSeekR1(LinearModules):
    """``encoder`` and ``decoder`` modules; the layer is in the file's name (``-l37.pt``)."""

    code, name = "F12", "deepseek_r1"
    title = "DeepSeek-R1 of qresearch (encoder, decoder)"
    encoder, decoder = "encoder", "decoder"
