"""Cells of all positions in one pass: rows of different beginnings, packed without padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate, groupby, pairwise, zip_longest
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.interventions.patching.cells import Patch, Step
from layerscope.interventions.patching.climbs import edit_of, write_patches
from layerscope.interventions.patching.recording import Recording
from layerscope.interventions.patching.tiles import evenly, joins_of
from layerscope.models import Capture, LanguageModel, Site, Start, TokenBatch
from layerscope.models.run import Packed, Piece
from layerscope.products.weights import weights_kept


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


class PackedClimbs:
    """Loads of steps that climb side by side: every block is run for all before the next one is."""

    def __init__(
        self, recording: Recording, loads: Sequence[Sequence[Step]], *, most_tokens: int
    ) -> None:
        self._loads = loads
        self._climbs = [PackedClimb(recording, load, most_tokens=most_tokens) for load in loads]

    @property
    def order(self) -> list[Step]:
        """The steps in the order of their results."""
        return [step for climb in self._climbs for step in climb.order]

    def run(self, progress: Callable[[int], None] | None = None) -> Float[Tensor, "cell d_model"]:
        """Return the final norm's output at the last position, in `order`.

        Args:
            progress: told after every block how many more cells' worth of work is done.
        """
        finals: dict[int, Tensor] = {}
        climbing = {at: climb.blocks() for at, climb in enumerate(self._climbs)}
        told = _told([climb.work() for climb in self._climbs], sum(map(len, self._loads)))
        while climbing:
            with weights_kept() if len(climbing) > 1 else nullcontext():
                for at, blocks in list(climbing.items()):
                    try:
                        next(blocks)
                    except StopIteration as end:
                        finals[at] = end.value
                        del climbing[at]
            if progress is not None:
                progress(next(told))
        return torch.cat([finals[at] for at in range(len(self._climbs))])


class PackedClimb:
    """Steps of any positions on their way up the blocks, as many in a pass as may be."""

    def __init__(self, recording: Recording, steps: Sequence[Step], *, most_tokens: int) -> None:
        self.recording = recording
        self.steps = list(steps)
        self.most_tokens = most_tokens
        self.n_layers = recording.model.n_layers
        # The steps that have joined, by their first position, in the order of their rows.
        self.order: list[Step] = []
        # Their tokens, one row of a step after the other.
        self.residual: Float[Tensor, "token d_model"] | None = None

    def work(self) -> list[int]:
        """Return what the parts of `blocks` cost, in blocks of one step."""
        joins, joined = joins_of(self.steps), 0
        layers = [*sorted(joins), self.n_layers]
        found: list[int] = []
        for layer, stop in pairwise(layers):
            joined += sum(step.entry == layer for step in joins[layer])
            found.append(joined * (stop - layer))
        return found

    def blocks(self) -> Generator[None, None, Float[Tensor, "cell d_model"]]:
        """Run the blocks up to the next join, again and again.

        Returns:
            The final norm's output at the last position, in `order`.
        """
        joins = joins_of(self.steps)
        layers = sorted(joins)
        final: Tensor | None = None
        for place, layer in enumerate(layers):
            joining = sorted(joins[layer], key=lambda step: step.column)
            # A step is listed where its first block runs, and again where it joins by itself.
            entering = [step for step in joining if step.entry == layer == step.first]
            opening = [step for step in joining if step.first == layer < step.entry]
            if entering:
                self._join(layer, entering, self._stored(layer, entering, self._widths(entering)))
            if self.order:
                stop = layers[place + 1] if place + 1 < len(layers) else self.n_layers
                final = self._advance(layer, stop)
            if opening:
                self._open(layer, opening)
            if place + 1 < len(layers):
                yield
        assert final is not None
        return final

    def _widths(self, steps: Sequence[Step]) -> list[int]:
        n_columns = self.recording.n_columns
        return [n_columns - step.column for step in steps]

    def _stored(
        self, layer: int, steps: Sequence[Step], widths: Sequence[int]
    ) -> Float[Tensor, "token d_model"]:
        """Return what the recording's block `layer` read, from each step's first position on."""
        stored = self.recording.residuals[layer]
        return torch.cat(
            [
                stored[step.row, step.column : step.column + width]
                for step, width in zip(steps, widths, strict=True)
            ]
        )

    def _join(self, layer: int, steps: Sequence[Step], joined: Tensor) -> None:
        """Patch what steps begin with, and put them among the others."""
        now = [
            (begin - step.column, patch)
            for begin, step in zip(_begins(self._widths(steps)), steps, strict=True)
            for patch in step.patches
            if patch.site == Site("resid_pre", layer)
        ]
        if now:
            write_patches(joined[None], now, 0, flat=True)
        if self.residual is None:
            self.order, self.residual = list(steps), joined
            return
        spans = [
            (step, source, begin)
            for source, some in ((self.residual, self.order), (joined, steps))
            for step, begin in zip(some, _begins(self._widths(some)), strict=True)
        ]
        spans.sort(key=lambda span: span[0].column)
        self.order = [step for step, _, _ in spans]
        # Neighbours that stay neighbours are copied in one piece.
        parts: list[tuple[Tensor, int, int]] = []
        for (_, source, begin), width in zip(spans, self._widths(self.order), strict=True):
            goes_on = bool(parts) and parts[-1][0] is source and parts[-1][2] == begin
            first = parts.pop()[1] if goes_on else begin
            parts.append((source, first, begin + width))
        self.residual = torch.cat([source[begin:end] for source, begin, end in parts])

    def _open(self, layer: int, steps: Sequence[Step]) -> None:
        """Run the first block of steps at the positions they change; they join the next one."""
        furthest: dict[int, int] = defaultdict(int)
        for step in steps:
            furthest[step.column] = max(furthest[step.column], step.last)
        widths = [furthest[step.column] - step.column + 1 for step in steps]
        left = self._pass(self._stored(layer, steps, widths), steps, widths, layer, layer + 1)
        joined = self._stored(layer + 1, steps, self._widths(steps))
        joined[_ranges(_begins(self._widths(steps)), widths).to(joined.device)] = left
        self._join(layer + 1, steps, joined)

    def _advance(self, layer: int, stop: int) -> Tensor | None:
        """Run all rows through blocks `layer` to `stop`; return the end, where that is reached."""
        assert self.residual is not None
        out = self._pass(self.residual, self.order, self._widths(self.order), layer, stop)
        if stop == self.n_layers:
            return out
        self.residual = out
        return None

    def _pass(
        self,
        residual: Float[Tensor, "token d_model"],
        steps: Sequence[Step],
        widths: Sequence[int],
        layer: int,
        stop: int,
    ) -> Tensor:
        """Return the residual after block ``stop - 1``, or what is unembedded at each row's end.

        The first takes the place of the residual before, where that needs several passes.
        """
        parts = evenly(widths, self.most_tokens)
        if len(parts) == 1:
            return self._part(residual, steps, widths, layer, stop)
        ends: list[Tensor] = []
        done = 0
        with weights_kept():
            for part in parts:
                tokens = slice(done, done + sum(widths[part]))
                found = self._part(residual[tokens], steps[part], widths[part], layer, stop)
                if stop == self.n_layers:
                    ends.append(found)
                else:
                    residual[tokens] = found
                done = tokens.stop
        return torch.cat(ends) if ends else residual

    def _part(
        self,
        residual: Float[Tensor, "token d_model"],
        steps: Sequence[Step],
        widths: Sequence[int],
        layer: int,
        stop: int,
    ) -> Tensor:
        """Do what `_pass` does, for as many steps as one pass may hold."""
        recording = self.recording
        begins = _begins(widths)
        by_site: dict[Site, list[tuple[int, Patch]]] = defaultdict(list)
        for begin, step in zip(begins, steps, strict=True):
            for patch in step.patches:
                # What joined here has its residual's patches already; later ones have not.
                joined = step.entry == layer and patch.site == Site("resid_pre", layer)
                if layer <= patch.layer < stop and not joined:
                    by_site[patch.site].append((begin - step.column, patch))
        whole = stop == self.n_layers
        site = "final_norm" if whole else f"resid_post.{stop - 1}"
        ends = [begin + width - 1 for begin, width in zip(begins, widths, strict=True)]
        places = [step.row * recording.n_columns + step.column for step in steps]
        return recording.model.run(
            _row(recording.batch.ids.flatten()[_ranges(places, widths)]),
            start=Start(layer, residual[None]),
            stop_after=None if whole else stop - 1,
            capture=Capture(site, positions=ends) if whole else site,
            edits=[edit_of(at, chosen, flat=True) for at, chosen in by_site.items()],
            logits=None,
            cache=recording.cache,
            products=recording.products,
            lean=True,
            packed=Packed(_pieces(steps, widths)),
        )[site][0]


def _told(work: Sequence[Sequence[int]], n: int) -> Iterator[int]:
    """Return the share of n steps that each round is, by the work of all that is done in it."""
    rounds = [sum(parts) for parts in zip_longest(*work, fillvalue=0)]
    shares = [n * done // max(sum(rounds), 1) for done in accumulate(rounds)]
    return (after - before for before, after in pairwise([0, *shares]))


def _pieces(steps: Sequence[Step], widths: Sequence[int]) -> tuple[Piece, ...]:
    """Return neighbouring steps of one first position and width as pieces."""
    shapes = [(step.column, width) for step, width in zip(steps, widths, strict=True)]
    pieces: list[Piece] = []
    for (column, width), same in groupby(range(len(steps)), key=lambda at: shapes[at]):
        pieces.append(Piece(column, tuple(steps[at].row for at in same), width))
    return tuple(pieces)


def _begins(widths: Sequence[int]) -> list[int]:
    """Return where rows of these widths begin when they are laid one after the other."""
    return [0, *accumulate(widths)][:-1]


def _ranges(begins: Sequence[int], widths: Sequence[int]) -> Int[Tensor, " token"]:
    """Return the numbers from each beginning on, as many as each width, one after the other."""
    counts = torch.tensor(widths)
    first = torch.tensor(begins) - torch.tensor(_begins(widths))
    return first.repeat_interleave(counts) + torch.arange(int(counts.sum()))


def _row(ids: Tensor) -> TokenBatch:
    return TokenBatch(ids[None], torch.ones_like(ids[None], dtype=torch.bool), (len(ids),))
