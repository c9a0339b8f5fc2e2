"""Every edge carried out: change one feature at one position, and measure the targets.

The edit adds ``(v - f) d`` to the clean run's own residual, so the dictionary's error stays what it
was and v = f changes nothing. One edit serves all its targets. A pass begins at the source's row,
and at its position with the keys and values of earlier positions; sources at neighbouring positions
share a pass and join it at their rows. A row without any edit goes along in every pass, so that a
change is a difference within one batch.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.features.pathways.state import ActiveFeatures, PromptState, TargetState
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
        dose: of a dose.
        row: row index of the residual that is changed.
        change: what is added.
        targets: indices of the targets that are read.
    """

    key: tuple[int, int, int]
    kind: str
    dose: float
    row: int
    position: int
    change: Float[Tensor, " d_model"]
    targets: tuple[int, ...]


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
    cells = list(_cells(state, edges, options))
    measured = Measured()
    for cell in cells:  # the clean run itself: there is nothing to carry out
        if not bool(cell.change.any()):
            for target in cell.targets:
                measured.doses[cell.key, target, cell.dose] = 0.0
    cells = [cell for cell in cells if bool(cell.change.any())]
    done = 0
    for tile in _tiles(cells, state, options.tokens):
        _carry_out(state, tile, measured)
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


def _cells(state: PromptState, edges: pl.DataFrame, options: ReplayOptions) -> Iterator[Cell]:
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
    for key, targets in grouped.items():
        layer = state.layers[key[0]]
        entry = _entry(layer, key)
        direction = layer.directions[layer.which[entry]]
        value = float(layer.values[entry])
        cell = partial(Cell, key=key, row=layer.row, position=key[2], targets=tuple(targets))
        for dose in options.doses:
            yield cell(kind="dose", dose=dose, change=(dose - 1.0) * value * direction)
        size = float(value * direction.norm())
        for kind, unit in _null_directions(state, layer, key, options):
            yield cell(kind=kind, dose=0.0, change=size * unit)


def _null_directions(
    state: PromptState, layer: ActiveFeatures, key: tuple[int, int, int], options: ReplayOptions
) -> Iterator[tuple[str, Tensor]]:
    """Yield unit vectors: random ones, and those of other features active at the same place."""
    if not options.nulls:
        return
    words = f"{options.seed}:{state.prompt_id}:{key}".encode()
    seed = int.from_bytes(hashlib.sha256(words).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    width = layer.directions.shape[1]
    for unit in torch.randn(options.nulls, width, generator=generator):
        yield "direction", (unit / unit.norm()).to(layer.directions)
    here = layer.at(key[2])
    others = layer.which[here][layer.ids[here] != key[1]]
    for place in torch.randperm(len(others), generator=generator)[: options.nulls // 2].tolist():
        direction = layer.directions[others[place]]
        sign = 1.0 if bool(torch.rand(1, generator=generator) < 0.5) else -1.0
        yield "feature", sign * direction / direction.norm().clamp_min(1e-30)


def _tiles(cells: Sequence[Cell], state: PromptState, tokens: int) -> Iterator[list[Cell]]:
    """Cut cells into passes: neighbouring positions, as many as the tokens allow."""
    tile: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: (cell.position, cell.row, cell.key, cell.kind)):
        first = tile[0].position if tile else cell.position
        width = state.n_positions - first
        full = (len(tile) + 2) * width > max(tokens, 2 * width)
        if tile and (cell.position - first >= _SPAN or full):
            yield tile
            tile = []
        tile.append(cell)
    if tile:
        yield tile


def _carry_out(state: PromptState, tile: Sequence[Cell], measured: Measured) -> None:
    """Let a tile's cells climb the blocks together, each from its row, and read their targets."""
    column = min(cell.position for cell in tile) if state.cache is not None else 0
    past = state.cache.before(column) if state.cache is not None and column else None
    read = {target for cell in tile for target in cell.targets}
    top = max(state.targets[target].row for target in read)
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
        joining = by_row.get(row, [])
        if joining:
            added = clean[row].expand(len(joining), -1, -1).clone()
            for place, cell in enumerate(joining):
                added[place, cell.position - column] += cell.change.to(added)
            rows = torch.cat([rows, added])
            climbing += joining
        for target in sorted(read):
            if state.targets[target].row == row:
                _measure(state.targets[target], target, rows, climbing, column, measured)


def _measure(
    target: TargetState,
    index: int,
    rows: Float[Tensor, "row pos d_model"],
    cells: Sequence[Cell],
    column: int,
    measured: Measured,
) -> None:
    at = target.target.position - column
    if at < 0:
        return
    read = target.read.to(rows.device, torch.float64)
    values = (rows[:, at].double() @ read).cpu()
    changes = (values[1:] - values[0]).tolist()
    drift = abs(float(values[0]) + target.bias - target.pre_activation)
    measured.floor[index] = max(measured.floor.get(index, 0.0), drift)
    for cell, change in zip(cells, changes, strict=True):
        if index not in cell.targets:
            continue
        if cell.kind == "dose":
            measured.doses[cell.key, index, cell.dose] = change
        else:
            place = (index, cell.key[0], cell.position, cell.kind)
            measured.nulls[place].append(change / max(float(cell.change.norm()), 1e-30))


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
