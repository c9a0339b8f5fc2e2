"""F11: Goodfire. One torch file: ``encoder_linear`` and ``decoder_linear``, ReLU, no pre-bias."""

from __future__ import annotations

from layerscope.features.formats.linear_modules import LinearModules


class Goodfire(LinearModules):
    """Goodfire's dictionaries of Llama models; the layer is in the file's name (``-l19.pth``)."""

    code, name = "F11", "goodfire"
    title = "Goodfire (encoder_linear, decoder_linear)"
    encoder, decoder = "encoder_linear", "decoder_linear"
