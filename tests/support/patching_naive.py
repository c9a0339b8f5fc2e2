"""One full forward pass per cell: the slow, obvious way that sweeps are held against."""

from __future__ import annotations

import torch

from layerscope.models import Apply


def naive_cells(recording, cells):
    """Return the last position's logits of every cell, [cell, vocab]."""
    model = recording.model
    rows = []
    for cell in cells:
        ids = recording.batch.ids[cell.row : cell.row + 1]
        edits = [Apply(patch.site, _put(patch)) for patch in cell.patches]
        edits = [*(edit for edit in recording.edits), *edits]
        rows.append(model.run(ids, edits=edits, logits="last").logits[0, -1])
    return torch.stack(rows)


def _put(patch):
    def put(values, _context):
        table = values.movedim(patch.site.pos_axis, 1)
        for at, column in enumerate(patch.columns):
            where = (0, column) if patch.unit is None else (0, column, patch.unit)
            table[where] = patch.value[at]
        return values

    return put
