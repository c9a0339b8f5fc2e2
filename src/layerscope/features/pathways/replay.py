"""Every edge carried out: change one feature at one position, and measure the targets.

The edit adds ``(v - f) d`` to the clean run's own residual, so the dictionary's error stays what it
was and v = f changes nothing. One edit serves all its targets. A pass begins at the source's row,
and at its position with the keys and values of earlier positions; sources at neighbouring positions
share a pass, join it at their rows, and leave it behind their last targets. A row without any edit
goes along in every pass, so that a change is a difference within one batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.features.pathways.state import ActiveFeatures, PromptState
from layerscope.models import Start, TokenBatch
from layerscope.models.backends.base import Cache

DOSES = (0.75, 0.5, 0.0, 2.0)
EDGE = ("source_layer", "source_id", "source_position", "target_layer", "target_id")
_SPAN = 8  # positions that may share a pass
_TOKENS = 8192  # in one pass over a block


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """What is replayed.

    Attributes:
        doses: the source's value as a multiple of its own: 0 ablates it, 1 changes nothing.
        nulls: random edits of the same size and place for every source: as many random directions,
            and half as many other features active there.
        seed: of the nulls.
        tokens: most tokens of one pass over a block; the result does not depend on it beyond
            rounding.
    """

    doses: tuple[float, ...] = DOSES
    nulls: int = 8
    seed: int = 0
    tokens: int = _TOKENS

    def __post_init__(self) -> None:
        if not self.doses or self.nulls < 0 or self.tokens < 1:
            raise ConfigError("replay needs doses, nulls of 0 or more, and tokens of 1 or more")


@dataclass(frozen=True, eq=False)
class Cell:
    """One edit: a vector added to a row of the residual at a position.

    Attributes:
        key: (source layer, feature, position), which may be of several cells.
        kind: "dose", "direction" or "feature" (the two nulls).
        number: which null of its kind.
        dose: of a dose.
        row: row index of the residual that is changed.
        size: what its vector is multiplied with: a write direction, or a null of length 1.
        targets: by row index, indices of the targets that are read there.
    """

    key: tuple[int, int, int]
    kind: str
    number: int
    dose: float
    row: int
    size: float
    targets: Mapping[int, Sequence[int]]

    @property
    def position(self) -> int:
        """Where the residual is changed."""
        return self.key[2]

    @cached_property
    def top(self) -> int:
        """Row index of the highest target."""
        return max(self.targets)


@dataclass(eq=False)
class Measured:
    """What cells did to their targets.

    Attributes:
        doses: (key, target, dose) -> change of the pre-activation.
        nulls: (target, source layer, source position, kind of null) -> change per unit of length,
            one for every null edit.
        floor: per target, how far a row without an edit is from the clean run: rounding.
    """

    doses: dict[tuple[tuple[int, int, int], int, float], float] = field(default_factory=dict)
    nulls: dict[tuple[int, int, int, str], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    floor: dict[int, float] = field(default_factory=dict)


@torch.no_grad()
def replay(
    state: PromptState,
    edges: pl.DataFrame,
    options: ReplayOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Carry out every edge of a prompt at every dose, and its nulls.

    Args:
        state: the prompt, with the edges' targets and active features.
        edges: rows of `discover` for this prompt.
        options: doses, nulls.
        progress: called with (cells done, cells in all).

    Raises:
        ConfigError: an edge is of another prompt, target or feature than the state has.
    """
    options = options or ReplayOptions()
    edits = _Edits(state, options)
    cells = list(_cells(state, edges, options, edits))
    measured = Measured()
    for cell in cells:  # the clean run itself: there is nothing to carry out
        if cell.size == 0.0:
            for target in itertools.chain.from_iterable(cell.targets.values()):
                measured.doses[cell.key, target, cell.dose] = 0.0
    cells = [cell for cell in cells if cell.size != 0.0]
    done = 0
    for tile in _tiles(cells, state, options.tokens):
        _carry_out(state, tile, edits, measured)
        done += len(tile)
        if progress is not None:
            progress(done, len(cells))
    return measured


def target_index(state: PromptState) -> dict[tuple[int, int, int], int]:
    """Return the place of every target by (layer, feature, position)."""
    return {
        (t.target.feature.layer, t.target.feature.feature_id, t.target.position): index
        for index, t in enumerate(state.targets)
    }


class _Edits:
    """The vectors that cells add, made a pass at a time: all of a run need not fit into memory."""

    def __init__(self, state: PromptState, options: ReplayOptions) -> None:
        self._state = state
        self._options = options
        self._lengths = {
            number: torch.linalg.vector_norm(layer.directions, dim=1).tolist()
            for number, layer in state.layers.items()
        }
        self.reads = _Reads(state)
        self._nulls = lru_cache(maxsize=64)(self._nulls_of)

    def source(self, key: tuple[int, int, int]) -> tuple[float, float]:
        """Return a source's value and the length of its write direction."""
        layer = self._state.layers[key[0]]
        entry = _entry(layer, key)
        return float(layer.values[entry]), self._lengths[key[0]][int(layer.which[entry])]

    def others(self, key: tuple[int, int, int]) -> int:
        """Return how many other features are active where a source is."""
        here = self._state.layers[key[0]].at(key[2])
        return here.stop - here.start - 1

    def of(self, cells: Sequence[Cell]) -> Float[Tensor, "cell d_model"]:
        """Return what cells of one row add."""
        layer = self._state.layers[cells[0].key[0]]
        directions = layer.directions
        found = directions.new_empty(len(cells), directions.shape[1])
        written: list[tuple[int, int, float]] = []  # place, direction, factor
        drawn: list[tuple[int, Tensor]] = []
        for place, cell in enumerate(cells):
            if cell.kind == "dose":
                written.append((place, int(layer.which[_entry(layer, cell.key)]), cell.size))
                continue
            units, signed = self._nulls(cell.key)
            if cell.kind == "direction":
                drawn.append((place, cell.size * units[cell.number]))
            else:
                which, sign = signed[cell.number]
                length = max(self._lengths[cell.key[0]][which], 1e-30)
                written.append((place, which, cell.size * sign / length))
        if written:
            places, which, factors = zip(*written, strict=True)
            factor = torch.tensor(factors, dtype=directions.dtype, device=directions.device)
            found[list(places)] = directions[list(which)] * factor[:, None]
        if drawn:
            places, units = zip(*drawn, strict=True)
            found[list(places)] = torch.stack(units).to(found)
        return found

    def _nulls_of(
        self, key: tuple[int, int, int]
    ) -> tuple[Float[Tensor, "null d_model"], list[tuple[int, float]]]:
        """Return random unit vectors, and signed other features that are active at the place."""
        state, count = self._state, self._options.nulls
        layer = state.layers[key[0]]
        words = f"{self._options.seed}:{state.prompt_id}:{key}".encode()
        seed = int.from_bytes(hashlib.sha256(words).digest()[:4], "big")
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
        units = torch.randn(count, layer.directions.shape[1], generator=generator)
        units = units / units.norm(dim=1, keepdim=True)
        here = layer.at(key[2])
        others = layer.which[here][layer.ids[here] != key[1]]
        signed = [
            (int(others[place]), 1.0 if bool(torch.rand(1, generator=generator) < 0.5) else -1.0)
            for place in torch.randperm(len(others), generator=generator)[: count // 2].tolist()
        ]
        return units, signed


class _Reads:
    """Read rows of the targets that read one row of the residual, side by side."""

    def __init__(self, state: PromptState) -> None:
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, target in enumerate(state.targets):
            groups[target.row, target.target.position].append(index)
        device = state.residuals.device
        self._groups: dict[int, list[tuple[int, list[int], Tensor]]] = defaultdict(list)
        for (row, position), members in sorted(groups.items()):
            reads = torch.stack([state.targets[index].read for index in members])
            self._groups[row].append((position, members, reads.to(device, torch.float64)))

    def at(self, row: int) -> Sequence[tuple[int, list[int], Tensor]]:
        """Return (position, indices of targets, read rows [target, d_model]) of a row."""
        return self._groups.get(row, ())


def _cells(
    state: PromptState, edges: pl.DataFrame, options: ReplayOptions, edits: _Edits
) -> Iterator[Cell]:
    """Yield the edits of all edges, one for all targets of a source."""
    places = target_index(state)
    grouped: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    names = ("source_layer", "source_id", "source_position")
    for row in edges.select(*names, "target_layer", "target_id", "target_position").iter_rows():
        target = places.get(row[3:])
        if target is None or row[0] not in state.layers:
            raise ConfigError(
                f"edge {row[:3]} -> {row[3:]} is of another prompt or dictionary than this state"
            )
        grouped[row[:3]].append(target)
    for key, found in grouped.items():
        targets: dict[int, list[int]] = defaultdict(list)
        for target in found:
            targets[state.targets[target].row].append(target)
        row = state.layers[key[0]].row
        value, length = edits.source(key)
        for number, dose in enumerate(options.doses):
            size = (dose - 1.0) * value if length else 0.0
            yield Cell(key, "dose", number, dose, row, size, targets)
        if not value * length:
            continue
        for number in range(options.nulls):
            yield Cell(key, "direction", number, 0.0, row, value * length, targets)
        for number in range(min(options.nulls // 2, edits.others(key))):
            yield Cell(key, "feature", number, 0.0, row, value * length, targets)


def _order(cell: Cell) -> tuple[int, int, tuple[int, int, int], str, int]:
    return cell.position, cell.row, cell.key, cell.kind, cell.number


def _tiles(cells: Sequence[Cell], state: PromptState, tokens: int) -> Iterator[list[Cell]]:
    """Cut cells into passes: neighbouring positions, as many as the tokens allow."""
    tile: list[Cell] = []
    for cell in sorted(cells, key=_order):
        first = tile[0].position if tile else cell.position
        width = state.n_positions - first
        full = (len(tile) + 2) * width > max(tokens, 2 * width)
        if tile and (cell.position - first >= _SPAN or full):
            yield tile
            tile = []
        tile.append(cell)
    if tile:
        yield tile


def _carry_out(state: PromptState, tile: Sequence[Cell], edits: _Edits, into: Measured) -> None:
    """Let a tile's cells climb the blocks together, each from its row, and read their targets."""
    column = min(cell.position for cell in tile) if state.cache is not None else 0
    past = state.cache.before(column) if state.cache is not None and column else None
    read = {target for cell in tile for some in cell.targets.values() for target in some}
    top = max(cell.top for cell in tile)
    end = 1 + max(state.targets[target].target.position for target in read)
    by_row: dict[int, list[Cell]] = defaultdict(list)
    for cell in tile:
        by_row[cell.row].append(cell)
    climbing: list[Cell] = []
    clean = state.residuals[:, column:end]
    first = min(by_row)
    rows = clean[first : first + 1].clone()  # row 0 of every pass carries no edit
    for row in range(first, top + 1):
        if row > first:
            rows = _block(state, row - 1, rows, column, end, past)
        _measure(state, row, rows, climbing, column, edits.reads, into)
        staying = [place for place, cell in enumerate(climbing) if cell.top > row]
        if len(staying) < len(climbing):
            rows = rows[[0, *(place + 1 for place in staying)]]
            climbing = [climbing[place] for place in staying]
        joining = by_row.get(row, [])
        if joining:
            added = clean[row].expand(len(joining), -1, -1).clone()
            places = [cell.position - column for cell in joining]
            added[list(range(len(joining))), places] += edits.of(joining).to(added)
            rows = torch.cat([rows, added])
            climbing += joining


def _measure(
    state: PromptState,
    row: int,
    rows: Float[Tensor, "row pos d_model"],
    cells: Sequence[Cell],
    column: int,
    reads: _Reads,
    into: Measured,
) -> None:
    """Read the targets of a row: one product for all of a position, one wait for the device."""
    wanted = {target for cell in cells for target in cell.targets.get(row, ())}
    for position, members, read in reads.at(row) if wanted else ():
        kept = [place for place, target in enumerate(members) if target in wanted]
        if position < column or not kept:
            continue
        values = (rows[:, position - column].double() @ read[kept].T).cpu()
        changes = (values[1:] - values[0]).tolist()
        places = {members[place]: number for number, place in enumerate(kept)}
        for target, number in places.items():
            known = state.targets[target]
            drift = abs(float(values[0, number]) + known.bias - known.pre_activation)
            into.floor[target] = max(into.floor.get(target, 0.0), drift)
        for cell, change in zip(cells, changes, strict=True):
            for target in cell.targets.get(row, ()):
                if target not in places:
                    continue
                if cell.kind == "dose":
                    into.doses[cell.key, target, cell.dose] = change[places[target]]
                else:
                    place = (target, cell.key[0], cell.position, cell.kind)
                    into.nulls[place].append(change[places[target]] / cell.size)


def _block(
    state: PromptState,
    block: int,
    rows: Float[Tensor, "row pos d_model"],
    column: int,
    end: int,
    past: Cache | None,
) -> Float[Tensor, "row pos d_model"]:
    n = rows.shape[0]
    ids = state.batch.ids[:, column:end].expand(n, -1).contiguous()
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), (ids.shape[1],) * n)
    site = f"resid_post.{block}"
    result = state.model.run(
        batch,
        start=Start(block, rows),
        stop_after=block,
        capture=site,
        logits=None,
        cache=None if past is None else past.select([0] * n),
    )
    return result[site]


def _entry(layer: ActiveFeatures, key: tuple[int, int, int]) -> int:
    here = layer.at(key[2])
    found = (layer.ids[here] == key[1]).nonzero()
    if not len(found):
        raise ConfigError(f"source {key} is not active on this prompt")
    return here.start + int(found[0])
