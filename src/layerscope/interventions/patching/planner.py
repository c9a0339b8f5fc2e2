"""What a sweep will cost in time and memory, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from layerscope.errors import ConfigError
from layerscope.interventions.patching.cells import Cell, Patch, step_of
from layerscope.interventions.patching.packed import packable
from layerscope.interventions.patching.pairs import TokenPair, batch_of
from layerscope.interventions.patching.sweeps import Node
from layerscope.interventions.patching.tiles import (
    DEFAULT_BUDGET,
    bytes_held,
    bytes_per_token,
    loads_of,
    packed_tokens,
    shape_of,
    tiles_of,
    tokens_by_layer,
)
from layerscope.models import LanguageModel, Start
from layerscope.models.backends.base import Capability
from layerscope.products import Products


@dataclass(frozen=True)
class Cost:
    """What a sweep computes.

    Attributes:
        cells: interventions in all; `idle` of them cannot have an effect and are not computed.
        passes: calls of one or several blocks.
        block_tokens: tokens times blocks that are computed.
        naive_block_tokens: the same with one full forward pass per cell.
        recorded_tokens: tokens of the plain passes that cells start from.
        read_tokens: what unembedding costs, in tokens of one block.
        bytes: of the largest batch of cells and of what the plain passes leave.
    """

    cells: int
    idle: int
    passes: int
    blocks: int
    block_tokens: int
    naive_block_tokens: int
    recorded_tokens: int
    read_tokens: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both, one after the other."""
        return Cost(
            self.cells + other.cells,
            self.idle + other.idle,
            self.passes + other.passes,
            self.blocks + other.blocks,
            self.block_tokens + other.block_tokens,
            self.naive_block_tokens + other.naive_block_tokens,
            self.recorded_tokens + other.recorded_tokens,
            self.read_tokens + other.read_tokens,
            max(self.bytes, other.bytes),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the cost as JSON values."""
        return asdict(self)


NO_COST = Cost(0, 0, 0, 0, 0, 0, 0, 0, 0)
"""The cost of nothing, to add to."""


@dataclass(frozen=True)
class Speed:
    """What this machine was measured to take, in seconds.

    Attributes:
        per_block: of one block in one pass, whatever its tokens.
        per_token: of one token in one block.
    """

    per_block: float
    per_token: float

    def seconds(self, cost: Cost, n_layers: int) -> float:
        """Return the predicted seconds of a cost."""
        blocks = cost.blocks + n_layers
        tokens = cost.block_tokens + cost.recorded_tokens * n_layers + cost.read_tokens
        return blocks * self.per_block + tokens * self.per_token


def cost_of(
    model: LanguageModel,
    pair: TokenPair,
    nodes: Sequence[Node],
    *,
    budget: int = DEFAULT_BUDGET,
    whole: bool = False,
) -> Cost:
    """Return what a sweep over a pair computes.

    Args:
        whole: a metric needs the logits of the whole vocabulary.
    """
    n_columns = len(pair.corrupt)
    cells: list[Cell] = []
    idle = 0
    for node in nodes:
        place = node.place
        if place is not None and place.clean == place.corrupt and place.clean < pair.same:
            idle += 1
            continue
        columns = tuple(range(n_columns)) if place is None else (place.corrupt,)
        # Only where a cell acts decides what it costs; its values are not looked at.
        cells.append(Cell((Patch(node.site, columns, torch.zeros(len(columns)), node.unit),)))
    recorded = len(pair.clean) + len(pair.corrupt)
    cost = cost_of_cells(model, cells, n_columns, recorded=recorded, budget=budget, whole=whole)
    naive = idle * model.n_layers * n_columns
    return replace(
        cost,
        cells=cost.cells + idle,
        idle=cost.idle + idle,
        naive_block_tokens=cost.naive_block_tokens + naive,
    )


def cost_of_cells(
    model: LanguageModel,
    cells: Sequence[Cell],
    n_columns: int,
    *,
    recorded: int,
    budget: int = DEFAULT_BUDGET,
    whole: bool = False,
) -> Cost:
    """Return what cells on a recording of some length compute; their values are not looked at.

    Whether the model takes packed rows is tried, once, with one short pass.
    """
    shape = shape_of(model, n_columns, budget)
    columns = Capability.CACHE in model.backend.capabilities
    found = [
        step_of(cell, at, n_layers=model.n_layers, n_columns=n_columns, columns=columns)
        for at, cell in enumerate(cells)
    ]
    steps = [step for step in found if step is not None]
    several = columns and len({step.column for step in steps}) > 1
    held = 0
    if several and packable(model, n_columns):
        together = loads_of(steps, shape)
        passes = [one for loads in together for load in loads for one in packed_tokens(load, shape)]
        held = max(
            sum(n_columns - step.column for load in loads for step in load) for loads in together
        )
    else:
        passes = [
            one
            for tile in tiles_of(steps, shape)
            for one in tokens_by_layer(tile.steps, tile.column, shape)
        ]
    width = model.dtype.itemsize
    kept = recorded * model.n_layers * width * (model.d_model * 3)
    largest = max((tokens for _, tokens in passes), default=0)
    return Cost(
        cells=len(cells),
        idle=len(cells) - len(steps),
        passes=len(passes),
        blocks=sum(blocks for blocks, _ in passes),
        block_tokens=sum(blocks * tokens for blocks, tokens in passes),
        naive_block_tokens=len(cells) * model.n_layers * n_columns,
        recorded_tokens=recorded,
        read_tokens=len(steps) * model.d_vocab // (12 * model.d_model) if whole else 0,
        bytes=largest * bytes_per_token(model, n_columns) + held * bytes_held(model) + kept,
    )


def calibrate(
    model: LanguageModel, pair: TokenPair, *, products: Products = "default", rounds: int = 2
) -> Speed:
    """Time one block at two sizes; a few milliseconds for a small model."""
    ids = pair.corrupt
    layer = model.n_layers // 2
    timings: list[tuple[int, float]] = []
    for rows in (1, 8):
        batch = batch_of([ids] * rows)
        residual = torch.zeros(
            (*batch.ids.shape, model.d_model), dtype=model.dtype, device=model.device
        )
        start = Start(layer, residual)
        best = float("inf")
        for _ in range(rounds + 1):
            _wait(model)
            begin = time.perf_counter()
            model.run(batch, start=start, stop_after=layer, logits=None, products=products)
            _wait(model)
            best = min(best, time.perf_counter() - begin)
        timings.append((rows * len(ids), best))
    (few, short), (many, long) = timings
    per_token = max((long - short) / (many - few), 0.0)
    return Speed(max(short - few * per_token, 0.0), per_token)


def check_budget(
    seconds: float, cost: Cost, *, most_seconds: float | None, most_bytes: int | None
) -> None:
    """Raise ConfigError for a sweep beyond what was allowed, with what it would take."""
    if most_seconds is not None and seconds > most_seconds:
        raise ConfigError(
            f"the sweep's {cost.cells} cells would take about {seconds:.0f} s, more than the "
            f"{most_seconds:.0f} s allowed; take fewer pairs, sites or positions, or allow more"
        )
    if most_bytes is not None and cost.bytes > most_bytes:
        raise ConfigError(
            f"the sweep would take about {cost.bytes / 2**20:.0f} MiB beside the model, more than "
            f"the {most_bytes / 2**20:.0f} MiB allowed; take fewer positions, shorter prompts, or "
            "allow more"
        )


def _wait(model: LanguageModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
