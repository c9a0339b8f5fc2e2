"""Which cells share a pass: tiles that begin at one position and grow as they climb the blocks.

A tile's pass runs block by block. A cell joins it at the first block whose input it changes, with
the stored residual of the recording; below that block, and before its first position, nothing of
it is computed. Cells of neighbouring positions may share a tile: a few columns more for some of
them, and fewer passes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from layerscope.interventions.patching.cells import Step
from layerscope.models import Site

if TYPE_CHECKING:
    from layerscope.models import LanguageModel

DEFAULT_BUDGET = 512 * 2**20
# Longest run of positions that may share a tile.
_NEIGHBOURS = 32
# A pass over one block costs as much as so many tokens more: weights that must be read, and calls,
# which are worth so many operations. Measured with 12 blocks of d_model 768 on two cores.
_WEIGHTS_IN_TOKENS = 24.0
_CALL_FLOPS = {"cpu": 3e8}
_CALL_FLOPS_ELSEWHERE = 1e10
# On a CPU a tensor beyond this comes in fresh pages, each a fault, whatever the C library was told
# to keep (`allocator`): passes over it take nearly twice as long. Where that would leave few tokens
# of a wide model, reading its weights again and again would cost more.
_LARGEST_TENSOR = 30 * 2**20
_FEWEST_TOKENS = 512


@dataclass(frozen=True)
class Tile:
    """Steps that climb together.

    Attributes:
        column: first position that is computed.
        steps: in the order in which they join.
    """

    column: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Shape:
    """What the cost and the memory of passes depend on.

    Attributes:
        overhead: cost of one pass over one block beside its tokens, in tokens.
        most_tokens: tokens that one pass may hold.
        most_loaded: tokens of packed rows that climb as one load, some in each pass.
        most_held: tokens of all loads that climb side by side.
    """

    n_layers: int
    n_columns: int
    overhead: float
    most_tokens: int
    most_loaded: int
    most_held: int


def shape_of(model: LanguageModel, n_columns: int, budget: int) -> Shape:
    """Return the shape of passes of this model within a budget of bytes.

    The same on every machine, so that equal requests are cut into equal tiles.
    """
    flops = 24.0 * model.d_model**2
    overhead = _WEIGHTS_IN_TOKENS
    overhead += _CALL_FLOPS.get(model.device.type, _CALL_FLOPS_ELSEWHERE) / flops
    most = loaded = held = budget // bytes_per_token(model, n_columns)
    if model.device.type == "cpu":
        warm = _LARGEST_TENSOR // model.dtype.itemsize
        most = min(most, max(warm // _widest(model), _FEWEST_TOKENS))
        left = budget - most * bytes_per_token(model, n_columns)
        held = left // bytes_held(model)
        loaded = min(held, warm // model.d_model)
    most = max(most, n_columns)
    loaded = max(loaded, most)
    return Shape(model.n_layers, n_columns, overhead, most, loaded, max(held, loaded))


def bytes_per_token(model: LanguageModel, n_columns: int) -> int:
    """Return about how many bytes one token of a pass over one block holds at its peak.

    The residual before and after, and its copies as rows join; in the MLP a few tensors of its
    width; in attention keys and values of the past, and scores where the kernel keeps them.
    """
    info = model.backend.info
    width = model.dtype.itemsize
    inner = 3 * _widest(model)
    return width * (6 * info.d_model + inner) + width * 2 * info.n_heads * n_columns


def bytes_held(model: LanguageModel) -> int:
    """Return how many bytes a token of packed rows holds between passes: its residual, twice."""
    return 2 * model.dtype.itemsize * model.d_model


def _widest(model: LanguageModel) -> int:
    """Return the width of the widest tensor of a block, which as a rule is its MLP's."""
    backend, neurons = model.backend, Site("mlp.post", 0)
    if backend.why_not(neurons) is not None:
        return 4 * model.d_model
    return max(model.d_model, backend.trailing(neurons, 1)[-1])


def tiles_of(steps: Sequence[Step], shape: Shape) -> list[Tile]:
    """Cut steps into tiles of least predicted cost that fit the budget."""
    by_column: dict[int, list[Step]] = defaultdict(list)
    for step in steps:
        by_column[step.column].append(step)
    columns = sorted(by_column)
    # best[n]: least cost of the first n columns, and where its last tile begins.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(columns) + 1):
        options: list[tuple[float, int]] = []
        for begin in range(end - 1, max(-1, end - 1 - _NEIGHBOURS), -1):
            together = [step for column in columns[begin:end] for step in by_column[column]]
            width = shape.n_columns - columns[begin]
            if begin < end - 1 and len(together) * width > shape.most_tokens:
                break
            cost = sum(
                _cost(part, columns[begin], shape)
                for part in _parts(together, columns[begin], shape)
            )
            options.append((best[begin][0] + cost, begin))
        best.append(min(options))
    tiles: list[Tile] = []
    end = len(columns)
    while end:
        begin = best[end][1]
        together = [step for column in columns[begin:end] for step in by_column[column]]
        first = columns[begin]
        tiles += [Tile(first, tuple(part)) for part in _parts(together, first, shape)][::-1]
        end = begin
    return tiles[::-1]


def loads_of(steps: Sequence[Step], shape: Shape) -> list[list[list[Step]]]:
    """Cut steps into the loads that climb side by side, and each of these into its packed rows."""
    ordered = sorted(steps, key=lambda step: (step.column, step.entry, step.first, step.index))
    return [
        [together[part] for part in evenly(_widths(together, shape), shape.most_loaded)]
        for together in (ordered[part] for part in evenly(_widths(ordered, shape), shape.most_held))
    ]


def _widths(steps: Sequence[Step], shape: Shape) -> list[int]:
    return [shape.n_columns - step.column for step in steps]


def evenly(widths: Sequence[int], most: int) -> list[slice]:
    """Cut a list into as few parts as hold `most` each (or one entry), none larger than need be."""
    ends = list(accumulate(widths, initial=0))
    parts = _greedily(ends, most)
    low, high = -(-ends[-1] // max(len(parts), 1)), most
    while low < high:
        middle = (low + high) // 2
        tighter = _greedily(ends, middle)
        if len(tighter) > len(parts):
            low = middle + 1
        else:
            parts, high = tighter, middle
    return parts


def _greedily(ends: Sequence[int], most: int) -> list[slice]:
    """Cut a list whose sums are `ends`, from the start on, where a part would hold too much."""
    parts: list[slice] = []
    start, last = 0, len(ends) - 1
    while start < last:
        stop = max(bisect_right(ends, ends[start] + most) - 1, start + 1)
        parts.append(slice(start, stop))
        start = stop
    return parts


def packed_tokens(load: Sequence[Step], shape: Shape) -> list[tuple[int, int]]:
    """Return what packed rows compute: (blocks in one pass, tokens) of each of their passes."""
    passes: list[tuple[int, int]] = []
    joins = joins_of(load)
    layers = sorted(joins)
    climbing: list[int] = []
    for place, layer in enumerate(layers):
        joining = sorted(joins[layer], key=lambda step: step.column)
        opening = [step.last - step.column + 1 for step in joining if step.entry > layer]
        climbing += [shape.n_columns - step.column for step in joining if step.entry == layer]
        climbing.sort(reverse=True)  # the first position comes first
        stop = layers[place + 1] if place + 1 < len(layers) else shape.n_layers
        for blocks, widths in ((1, opening), (stop - layer, climbing)):
            parts = evenly(widths, shape.most_tokens)
            passes += [(blocks, sum(widths[part])) for part in parts]
    return passes


def tokens_by_layer(tile: Sequence[Step], column: int, shape: Shape) -> list[tuple[int, int]]:
    """Return what a tile computes: (blocks in one pass, tokens) of each of its passes."""
    passes: list[tuple[int, int]] = []
    width = shape.n_columns - column
    joins = joins_of(tile)
    layers = sorted(joins)
    rows = 0
    for place, layer in enumerate(layers):
        above = [step.last for step in joins[layer] if step.entry > layer]
        if above:
            passes.append((1, len(above) * (max(above) - column + 1)))
        rows += len(joins[layer]) - len(above)
        stop = layers[place + 1] if place + 1 < len(layers) else shape.n_layers
        if rows:
            passes.append((stop - layer, rows * width))
    return passes


def joins_of(steps: Sequence[Step]) -> dict[int, list[Step]]:
    """Return, by block, the steps that join there or whose first block runs there."""
    joins: dict[int, list[Step]] = defaultdict(list)
    for step in steps:
        joins[step.entry].append(step)
        if step.entry > step.first:
            joins[step.first].append(step)
    return joins


def _cost(steps: Sequence[Step], column: int, shape: Shape) -> float:
    return sum(
        blocks * (shape.overhead + tokens)
        for blocks, tokens in tokens_by_layer(steps, column, shape)
    )


def _parts(steps: Sequence[Step], column: int, shape: Shape) -> list[list[Step]]:
    """Cut what is too large for one pass; neighbours in entry stay together."""
    ordered = sorted(steps, key=lambda step: (step.entry, step.first, step.index))
    most = max(shape.most_tokens // (shape.n_columns - column), 1)
    count = -(-len(ordered) // most)
    size = -(-len(ordered) // count)
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
