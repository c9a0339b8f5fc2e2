"""A tile of cells of one width on its way up the blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.interventions.patching.cells import Patch, Step
from layerscope.interventions.patching.recording import Recording
from layerscope.interventions.patching.tiles import Tile, joins_of
from layerscope.models import Apply, Capture, EditContext, Site, Start, TokenBatch
from layerscope.models.backends.base import Cache


@dataclass
class Climb:
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

    def run(self, progress: Callable[[int], None] | None = None) -> Float[Tensor, "cell d_model"]:
        """Return the final norm's output at the last position, in `order`.

        Args:
            progress: told of the cells at the end.
        """
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
        if progress is not None:
            progress(len(self.order))
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
            write_patches(joined, now, self.column)
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
            write_patches(joined, now, self.column)
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


def edit_of(
    site: Site, chosen: Sequence[tuple[int, Patch]], column: int = 0, *, flat: bool = False
) -> Apply:
    """Return one edit that puts patches of one site into batch rows, positions from `column`.

    In a `flat` batch of one row a patch comes with what is added to its positions, not with a row.
    """

    def put(values: Tensor, _context: EditContext) -> Tensor:
        write_patches(values.movedim(site.pos_axis, 1), chosen, column, flat=flat)
        return values

    return Apply(site, put)


def write_patches(
    values: Float[Tensor, "row pos ..."],
    chosen: Sequence[tuple[int, Patch]],
    column: int,
    *,
    flat: bool = False,
) -> None:
    """Write patches of one site into its values, whose first position is `column`."""
    for units in (False, True):
        some = [(row, patch) for row, patch in chosen if (patch.unit is not None) == units]
        if not some:
            continue
        rows = [0 if flat else row for row, patch in some for _ in patch.columns]
        places = [at - column + (row if flat else 0) for row, patch in some for at in patch.columns]
        index = [rows, places]
        if units:
            index.append([patch.unit or 0 for _, patch in some for _ in patch.columns])
        new = torch.cat([patch.value for _, patch in some]).to(values.device, values.dtype)
        values[tuple(torch.tensor(part, device=values.device) for part in index)] = new
