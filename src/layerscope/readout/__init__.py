"""Readout: hidden states to statistics over the vocabulary, in one streaming pass.

All layers of all positions in one call, each row compared with the last layer of its position::

    from layerscope.readout import Reference, Request, TokenSets, readout

    # normed: [layer, pos, d_model], transformed by a lens; answers: [pos] token ids
    n_rows, n_pos = normed.shape[0], normed.shape[1]
    last_row = (n_rows - 1) * n_pos + torch.arange(n_pos).repeat(n_rows)
    result = readout(
        normed.flatten(0, 1),                            # [layer * pos, d_model]
        model.unembedding,
        request=Request(top_k=10, overlap_k=50),
        reference=Reference(index=last_row),              # rows of this very call: no extra product
        tokens=answers.repeat(n_rows)[:, None],           # [row, 1]; -1 for none
        token_sets=TokenSets.of([prompt_ids], torch.zeros(n_rows * n_pos, 1, dtype=torch.long)),
    )
    result.entropy_bits, result.reference.kl_to_bits, result.token_rank, result.set_mass

The reference may also be other hidden rows (``Reference(index=..., hidden=...)``) or given logits
(``Reference(index=..., logits=...)``). ``against=`` takes the same rows in another lens and fills
``result.against``.
"""

from __future__ import annotations

from layerscope.readout.fused import describe as describe_kernels
from layerscope.readout.request import Reference, Request, TokenSets
from layerscope.readout.result import Divergences, Readout
from layerscope.readout.stream import readout
from layerscope.readout.temperature import TemperatureFit, fit_temperature
from layerscope.readout.unembedding import Unembedding

__all__ = [
    "Divergences",
    "Readout",
    "Reference",
    "Request",
    "TemperatureFit",
    "TokenSets",
    "Unembedding",
    "describe_kernels",
    "fit_temperature",
    "readout",
]
