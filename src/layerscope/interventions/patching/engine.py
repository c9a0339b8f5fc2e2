"""Cells carried out many at a time, each from where it first differs from the recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.interventions.patching.cells import Cell, Step, check_cell, step_of
from layerscope.interventions.patching.climbs import Climb
from layerscope.interventions.patching.packed import PackedClimbs, split
from layerscope.interventions.patching.recording import Recording
from layerscope.interventions.patching.tiles import (
    DEFAULT_BUDGET,
    Shape,
    loads_of,
    shape_of,
    tiles_of,
)
from layerscope.products import products as matrix_products

Read = Callable[[Float[Tensor, "cell d_model"], Sequence[int]], Tensor]
"""What is unembedded at the last position, and the recording's row of each: [cell, ...] results."""


def run_cells(
    recording: Recording,
    cells: Sequence[Cell],
    read: Read,
    *,
    budget: int = DEFAULT_BUDGET,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return what `read` says of every cell, in order; exact, up to the rounding of larger batches.

    A cell starts at its first block from the stored residual, and at its first position from the
    stored keys and values. A cell that cannot reach the last position's logits, such as one that
    changes the last block at an earlier position, is read from the recording itself.

    Args:
        read: given rows of the final norm's output at the last position.
        budget: bytes that a batch of cells may take beside the recording.
        progress: told of cells, or of as much work, that are done.

    Raises:
        EditError, SiteError: a cell does not fit, before anything runs.
    """
    steps, shape = prepare(recording, cells, budget)
    untouched = read(recording.final, range(len(recording)))
    results = untouched[torch.tensor([cell.row for cell in cells])].clone()
    if progress is not None and len(steps) < len(cells):
        progress(len(cells) - len(steps))
    # One scope for all passes: to open one takes a tenth of a millisecond.
    with matrix_products(recording.products, device=recording.model.device):
        for climb in climbs_of(recording, steps, shape):
            final = climb.run(progress)
            values = read(final, [step.row for step in climb.order])
            results[torch.tensor([step.index for step in climb.order])] = values
    return results


def climbs_of(
    recording: Recording, steps: Sequence[Step], shape: Shape
) -> Iterator[Climb | PackedClimbs]:
    """Yield batches of steps: packed rows where the model takes them, else tiles of one width."""
    packed, others = split(recording, steps)
    for loads in loads_of(packed, shape):
        yield PackedClimbs(recording, loads, most_tokens=shape.most_tokens)
    yield from (Climb(recording, tile) for tile in tiles_of(others, shape))


def prepare(recording: Recording, cells: Sequence[Cell], budget: int) -> tuple[list[Step], Shape]:
    """Check cells and return the steps that have an effect, and the shape of their passes."""
    model = recording.model
    n_columns = recording.n_columns
    for cell in cells:
        check_cell(model, cell, len(recording), n_columns)
    found = (
        step_of(
            cell,
            index,
            n_layers=model.n_layers,
            n_columns=n_columns,
            columns=recording.cache is not None,
        )
        for index, cell in enumerate(cells)
    )
    return [step for step in found if step is not None], shape_of(model, n_columns, budget)
