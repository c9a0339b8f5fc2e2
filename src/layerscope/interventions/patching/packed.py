"""Cells of all positions in one pass: rows of different beginnings, packed without padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.interventions.patching.cells import Patch, Step
from layerscope.interventions.patching.climbs import edit_of, write_patches
from layerscope.interventions.patching.recording import Recording
from layerscope.interventions.patching.tiles import joins_of
from layerscope.models import Capture, LanguageModel, Site, Start, TokenBatch
from layerscope.models.run import Packed, Piece


def packable(model: LanguageModel, n_columns: int) -> bool:
    """Return whether a model takes packed rows that reach so many positions; found by trying."""
    known = _TRIED.setdefault(model.backend, {})
    if n_columns not in known:
        known[n_columns] = _try(model, n_columns)
    return known[n_columns]


def split(recording: Recording, steps: Sequence[Step]) -> tuple[list[Step], list[Step]]:
    """Return the steps that go into packed rows, and the others.

    Steps of one width need no packing; scores and patterns cannot be edited in packed rows.
    """
    fit = [step for step in steps if all(patch.site.pos_axis == 1 for patch in step.patches)]
    if recording.cache is None or len({step.column for step in fit}) < 2:
        return [], list(steps)
    if not packable(recording.model, recording.n_columns):
        return [], list(steps)
    chosen = {step.index for step in fit}
    return fit, [step for step in steps if step.index not in chosen]


# By backend: whether it takes packed rows that reach so many columns.
_TRIED: WeakKeyDictionary[object, dict[int, bool]] = WeakKeyDictionary()


def _try(model: LanguageModel, n_columns: int) -> bool:
    """Send one row through the last block."""
    ids = torch.zeros(n_columns, dtype=torch.long)
    residual = torch.zeros(1, n_columns, model.d_model, dtype=model.dtype, device=model.device)
    try:
        cache = model.run(_row(ids[:1]), logits=None, keep_cache=True).cache
        model.run(
            _row(ids),
            start=Start(-1, residual),
            logits=None,
            cache=cache,
            packed=Packed((Piece(0, (0,), n_columns),)),
        )
    except CapabilityError:
        return False
    return True


@dataclass
class _Group:
    """Rows that begin at one position."""

    steps: list[Step] = field(default_factory=lambda: [])
    residual: Tensor | None = None

    def add(self, steps: Sequence[Step], joined: Float[Tensor, "row pos d_model"]) -> None:
        """Take rows in."""
        self.steps += steps
        self.residual = joined if self.residual is None else torch.cat([self.residual, joined])


class PackedClimb:
    """Steps of any positions on their way up the blocks."""

    def __init__(self, recording: Recording, steps: Sequence[Step]) -> None:
        self.recording = recording
        self.steps = list(steps)
        self.groups: dict[int, _Group] = {}
        self.n_layers = recording.model.n_layers

    @property
    def order(self) -> list[Step]:
        """The steps in the order in which they are computed and read."""
        return [step for column in sorted(self.groups) for step in self.groups[column].steps]

    def run(self) -> Float[Tensor, "cell d_model"]:
        """Return the final norm's output at the last position, in `order`."""
        joins = joins_of(self.steps)
        layers = sorted(joins)
        final: Tensor | None = None
        for place, layer in enumerate(layers):
            joining = joins[layer]
            for column, steps in _by_column(joining, opening=False, layer=layer).items():
                rows = torch.tensor([step.row for step in steps])
                stored = self.recording.residuals[layer][:, column:]
                self._join(layer, column, steps, stored[rows.to(stored.device)])
            opening = _by_column(joining, opening=True, layer=layer)
            if self.groups:
                stop = layers[place + 1] if place + 1 < len(layers) else self.n_layers
                final = self._advance(layer, stop)
            if opening:
                self._open(layer, opening)
        assert final is not None
        return final

    def _join(self, layer: int, column: int, steps: list[Step], joined: Tensor) -> None:
        now = [
            (row, patch)
            for row, step in enumerate(steps)
            for patch in step.patches
            if patch.site == Site("resid_pre", layer)
        ]
        if now:
            write_patches(joined, now, column)
        self.groups.setdefault(column, _Group()).add(steps, joined)

    def _open(self, layer: int, opening: dict[int, list[Step]]) -> None:
        """Run the first block of steps at the positions they change; they join the next one."""
        pieces: list[Piece] = []
        parts: list[Tensor] = []
        for column, steps in opening.items():
            width = max(step.last for step in steps) - column + 1
            rows = [step.row for step in steps]
            stored = self.recording.residuals[layer]
            index = torch.tensor(rows, device=stored.device)
            parts.append(stored[index, column : column + width])
            pieces.append(Piece(column, tuple(rows), width))
        steps = [step for some in opening.values() for step in some]
        left = self._pass(pieces, parts, steps, layer, layer + 1, ())
        for (column, some), piece, own in zip(opening.items(), pieces, left, strict=True):
            above = self.recording.residuals[layer + 1][:, column:]
            joined = above[torch.tensor(piece.rows, device=above.device)]
            joined[:, : piece.width] = own
            self._join(layer + 1, column, some, joined)

    def _advance(self, layer: int, stop: int) -> Tensor | None:
        """Run all rows through blocks `layer` to `stop`; return the end, where that is reached."""
        pieces: list[Piece] = []
        parts: list[Tensor] = []
        for column in sorted(self.groups):
            group = self.groups[column]
            assert group.residual is not None
            rows = tuple(step.row for step in group.steps)
            pieces.append(Piece(column, rows, group.residual.shape[1]))
            parts.append(group.residual)
        # What joined here has its residual's patches already; later ones have not.
        done = Site("resid_pre", layer)
        out = self._pass(pieces, parts, self.order, layer, stop, (done,))
        if stop == self.n_layers:
            return out[0]
        for column, own in zip(sorted(self.groups), out, strict=True):
            self.groups[column].residual = own
        return None

    def _pass(
        self,
        pieces: Sequence[Piece],
        parts: Sequence[Float[Tensor, "row pos d_model"]],
        steps: Sequence[Step],
        layer: int,
        stop: int,
        done: Sequence[Site],
    ) -> list[Tensor]:
        """Return each piece's residual after block ``stop - 1``, or what is unembedded at last."""
        recording = self.recording
        model = recording.model
        by_site: dict[Site, list[tuple[int, Patch]]] = defaultdict(list)
        begin = 0
        ends: list[int] = []
        own = iter(steps)
        for piece in pieces:
            for _ in piece.rows:
                step = next(own)
                for patch in step.patches:
                    joined = patch.site in done and step.entry == layer
                    if layer <= patch.layer < stop and not joined:
                        by_site[patch.site].append((begin - piece.column, patch))
                begin += piece.width
                ends.append(begin - 1)
        whole = stop == model.n_layers
        site = "final_norm" if whole else f"resid_post.{stop - 1}"
        ids = [
            recording.batch.ids[list(piece.rows), piece.column : piece.column + piece.width]
            for piece in pieces
        ]
        result = model.run(
            _row(torch.cat([part.flatten() for part in ids])),
            start=Start(layer, torch.cat([part.flatten(0, 1) for part in parts])[None]),
            stop_after=None if whole else stop - 1,
            capture=Capture(site, positions=ends) if whole else site,
            edits=[edit_of(at, chosen, flat=True) for at, chosen in by_site.items()],
            logits=None,
            cache=recording.cache,
            products=recording.products,
            lean=True,
            packed=Packed(tuple(pieces)),
        )[site][0]
        if whole:
            return [result]
        sizes = [piece.size for piece in pieces]
        return [
            part.unflatten(0, (-1, piece.width))
            for part, piece in zip(result.split(sizes), pieces, strict=True)
        ]


def _by_column(joining: Sequence[Step], *, opening: bool, layer: int) -> dict[int, list[Step]]:
    found: dict[int, list[Step]] = defaultdict(list)
    for step in joining:
        opens = step.first == layer < step.entry
        # A step is listed where its first block runs, and again where it joins by itself.
        if opens == opening and (opening or step.first == layer):
            found[step.column].append(step)
    return dict(sorted(found.items()))


def _row(ids: Tensor) -> TokenBatch:
    return TokenBatch(ids[None], torch.ones_like(ids[None], dtype=torch.bool), (len(ids),))
