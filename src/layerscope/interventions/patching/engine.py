"""Cells carried out many at a time, each from where it first differs from the recording."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.interventions.patching.cells import Cell, Patch, Step, check_cell, step_of
from layerscope.interventions.patching.recording import Recording
from layerscope.interventions.patching.tiles import (
    DEFAULT_BUDGET,
    Shape,
    Tile,
    joins_of,
    shape_of,
    tiles_of,
)
from layerscope.models import Apply, Capture, EditContext, Site, Start, TokenBatch
from layerscope.models.backends.base import Cache

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
        progress: told of every batch of cells that is done.

    Raises:
        EditError, SiteError: a cell does not fit, before anything runs.
    """
    steps, shape = prepare(recording, cells, budget)
    untouched = read(recording.final, range(len(recording)))
    results = untouched[torch.tensor([cell.row for cell in cells])].clone()
    if progress is not None and len(steps) < len(cells):
        progress(len(cells) - len(steps))
    for tile in tiles_of(steps, shape):
        climb = _Climb(recording, tile)
        final = climb.run()
        order = climb.order
        values = read(final, [step.row for step in order])
        results[torch.tensor([step.index for step in order])] = values
        if progress is not None:
            progress(len(order))
    return results


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


@dataclass
class _Climb:
    """One tile on its way up the blocks."""

    recording: Recording
    tile: Tile

    def __post_init__(self) -> None:
        self.order: list[Step] = []
        self.residual: Tensor | None = None
        self.column = self.tile.column
        stored = self.recording.cache
        # Nothing comes before the first position.
        self.past = stored.before(self.column) if stored is not None and self.column else None

    def run(self) -> Float[Tensor, "cell d_model"]:
        """Return the final norm's output at the last position, in `order`."""
        joins = joins_of(self.tile.steps)
        layers = sorted(joins)
        n_layers = self.recording.model.n_layers
        final: Tensor | None = None
        for place, layer in enumerate(layers):
            joining = joins[layer]
            self._join(layer, [step for step in joining if step.entry == layer == step.first])
            stop = layers[place + 1] if place + 1 < len(layers) else n_layers
            opening = [step for step in joining if step.first == layer < step.entry]
            if self.order:
                final = self._advance(layer, stop)
            if opening:
                self._open(layer, opening)
        assert final is not None
        return final

    def _join(self, layer: int, steps: list[Step]) -> None:
        """Let steps begin at a block from the recording's residual."""
        if not steps:
            return
        stored = self.recording.residuals[layer][:, self.column :]
        joined = stored[torch.tensor([step.row for step in steps], device=stored.device)]
        now = [
            (row, patch)
            for row, step in enumerate(steps)
            for patch in step.patches
            if patch.site == Site("resid_pre", layer)
        ]
        if now:
            _write(joined, now, self.column)
        self._append(steps, joined)

    def _open(self, layer: int, steps: list[Step]) -> None:
        """Run the first block of steps at the positions they change; they join the next one."""
        end = max(step.last for step in steps) + 1
        rows = [step.row for step in steps]
        stored = self.recording.residuals[layer][:, self.column : end]
        index = torch.tensor(rows, device=stored.device)
        left = self._pass(
            rows, stored[index], [step.patches for step in steps], layer, layer + 1, end=end
        )
        above = self.recording.residuals[layer + 1][:, self.column :]
        joined = above[index]
        joined[:, : end - self.column] = left
        now = [
            (row, patch)
            for row, step in enumerate(steps)
            for patch in step.patches
            if patch.site == Site("resid_pre", layer + 1)
        ]
        if now:
            _write(joined, now, self.column)
        self._append(steps, joined)

    def _append(self, steps: list[Step], joined: Tensor) -> None:
        self.order += steps
        self.residual = joined if self.residual is None else torch.cat([self.residual, joined])

    def _advance(self, layer: int, stop: int) -> Tensor | None:
        """Run all rows through blocks `layer` to `stop`; return the end, where that is reached."""
        assert self.residual is not None
        # What joined here has its residual's patches already; later ones have not.
        patches = [
            tuple(
                patch
                for patch in step.patches
                if not (patch.site == Site("resid_pre", layer) and step.entry == layer)
            )
            for step in self.order
        ]
        rows = [step.row for step in self.order]
        out = self._pass(rows, self.residual, patches, layer, stop)
        if stop < self.recording.model.n_layers:
            self.residual = out
            return None
        return out

    def _pass(
        self,
        rows: Sequence[int],
        residual: Float[Tensor, "row pos d_model"],
        patches: Sequence[Sequence[Patch]],
        layer: int,
        stop: int,
        *,
        end: int | None = None,
    ) -> Tensor:
        """Return the residual after block ``stop - 1``, or what is unembedded at the last place."""
        recording = self.recording
        model = recording.model
        batch, cache = self._inputs(rows, end)
        whole = end is None and stop == model.n_layers
        site = "final_norm" if whole else f"resid_post.{stop - 1}"
        by_site: dict[Site, list[tuple[int, Patch]]] = defaultdict(list)
        for row, own in enumerate(patches):
            for patch in own:
                if layer <= patch.layer < stop:
                    by_site[patch.site].append((row, patch))
        result = model.run(
            batch,
            start=Start(layer, residual),
            stop_after=None if whole else stop - 1,
            capture=Capture(site, positions=-1) if whole else site,
            edits=[edit_of(at, chosen, self.column) for at, chosen in by_site.items()],
            logits=None,
            cache=cache,
            products=recording.products,
            lean=True,
        )
        return result[site][:, -1] if whole else result[site]

    def _inputs(self, rows: Sequence[int], end: int | None) -> tuple[TokenBatch, Cache | None]:
        """Return the ids of a pass from this tile's first position on, and what they continue."""
        recording = self.recording
        ids = recording.batch.ids[torch.tensor(rows), self.column : end]
        batch = TokenBatch(
            ids, torch.ones_like(ids, dtype=torch.bool), (ids.shape[1],) * ids.shape[0]
        )
        return batch, None if self.past is None else self.past.select(rows)


def edit_of(site: Site, chosen: Sequence[tuple[int, Patch]], column: int = 0) -> Apply:
    """Return one edit that puts patches of one site into batch rows, positions from `column`."""

    def put(values: Tensor, _context: EditContext) -> Tensor:
        _write(values.movedim(site.pos_axis, 1), chosen, column)
        return values

    return Apply(site, put)


def _write(
    values: Float[Tensor, "row pos ..."], chosen: Sequence[tuple[int, Patch]], column: int
) -> None:
    """Write patches of one site into its values, whose first position is `column`."""
    for units in (False, True):
        some = [(row, patch) for row, patch in chosen if (patch.unit is not None) == units]
        if not some:
            continue
        rows = [row for row, patch in some for _ in patch.columns]
        places = [at - column for _, patch in some for at in patch.columns]
        index = [rows, places]
        if units:
            index.append([patch.unit or 0 for _, patch in some for _ in patch.columns])
        new = torch.cat([patch.value for _, patch in some]).to(values.device, values.dtype)
        values[tuple(torch.tensor(part, device=values.device) for part in index)] = new
