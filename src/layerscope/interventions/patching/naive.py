"""One full forward pass per cell: the slow, obvious way, for checking the fast one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.interventions.patching.cells import Cell, Patch
from layerscope.interventions.patching.recording import Recording
from layerscope.models import Apply, Capture, EditContext


def naive_cells(recording: Recording, cells: Sequence[Cell]) -> Float[Tensor, "cell d_model"]:
    """Return what is unembedded at the last position of every cell, each by a pass of its own."""
    model = recording.model
    rows: list[Tensor] = []
    for cell in cells:
        patches = [Apply(patch.site, _put(patch)) for patch in cell.patches]
        result = model.run(
            recording.batch.ids[cell.row : cell.row + 1],
            capture=Capture("final_norm", positions=-1),
            edits=[*recording.edits, *patches],
            logits=None,
            products=recording.products,
        )
        rows.append(result["final_norm"][0, -1])
    return torch.stack(rows)


def _put(patch: Patch):
    def put(values: Tensor, _context: EditContext) -> Tensor:
        table = values.movedim(patch.site.pos_axis, 1)
        for at, column in enumerate(patch.columns):
            where = (0, column) if patch.unit is None else (0, column, patch.unit)
            table[where] = patch.value[at]
        return values

    return put
