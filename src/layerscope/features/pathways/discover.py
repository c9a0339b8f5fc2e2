"""Which earlier features drive a target: gradients swept once from the top of the model down.

An edge's gradient J is d z / d f: how the target's pre-activation z changes with the value f of a
source, through the residual stream. Its attribution is J (f - baseline), in units of z. The
gradient of z by the residual, projected on the source's write direction, is that of a model with
the dictionary spliced in and its error held constant, so nothing has to be spliced.

One sweep serves all targets: their cotangents join at the row that each reads, and go down together
(sparse feature circuits, Marks et al. 2024, for the quantity; here without intermediate nodes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, nearest
from layerscope.features.pathways.pullback import Pullback, Variant
from layerscope.features.pathways.state import ActiveFeatures, PromptState, TargetState
from layerscope.products import Products, choose
from layerscope.products import products as matrix_products

ErrorMode = Literal["passthrough", "frozen"]
Order = Literal["attribution", "activation", "gradient"]
SourcePositions = Literal["all", "last"]
_GATHERED = 16  # positions whose directions are copied at a time

SCHEMA: Mapping[str, pl.DataType] = {
    "prompt_id": pl.String(),
    "space": pl.String(),
    "source_layer": pl.Int64(),
    "source_id": pl.Int64(),
    "source_position": pl.Int64(),
    "source_token": pl.String(),
    "source_activation": pl.Float64(),
    "target_layer": pl.Int64(),
    "target_id": pl.Int64(),
    "target_position": pl.Int64(),
    "target_token": pl.String(),
    "target_pre_activation": pl.Float64(),
    "target_activation": pl.Float64(),
    "target_active": pl.Boolean(),
    "variant": pl.String(),
    "error_mode": pl.String(),
    "gradient": pl.Float64(),
    "attribution": pl.Float64(),
    "share": pl.Float64(),
    "rank": pl.Int64(),
}


@dataclass(frozen=True, kw_only=True)
class DiscoverOptions:
    """What counts as an edge.

    Attributes:
        variant: "total", "frozen" or "linear", see `pullback`.
        error: "passthrough" lets gradients pass a dictionary's error; "frozen" lets them pass only
            through its features, at every dictionary between source and target.
        positions: sources at "all" positions up to the target's, or at its own only ("last").
        top_k: edges kept per target.
        order: what they are ranked by: size of the attribution, of the gradient, or the source's
            activation (the rule of earlier work, for comparison: large is not relevant).
        min_share: least share of all sources' absolute attribution.
        min_gradient: least absolute gradient; depends on the dictionary's scale.
        chunk: cotangents of one backward pass; None chooses by memory. The result does not depend
            on it beyond rounding.
        products: "checked" (the fastest float32-accurate product) or "default" (torch as found).
    """

    variant: Variant = "total"
    error: ErrorMode = "passthrough"
    positions: SourcePositions = "all"
    top_k: int = 25
    order: Order = "attribution"
    min_share: float = 0.0
    min_gradient: float = 0.0
    chunk: int | None = None
    products: Products = "checked"

    def __post_init__(self) -> None:
        for name, known in (
            ("error", get_args(ErrorMode)),
            ("positions", get_args(SourcePositions)),
            ("order", get_args(Order)),
            ("products", get_args(Products)),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"unknown {name} '{value}'{nearest(str(value), known)}; use {', '.join(known)}"
                )
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; keep at least 1 edge per target")


def discover(
    state: PromptState,
    options: DiscoverOptions | None = None,
    *,
    baseline: PromptState | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Return the strongest edges into every target of a prompt, one row each (see `SCHEMA`).

    Memory: cotangents, [targets, positions, d_model] twice, and one block's backward pass of
    `chunk` of them.

    Args:
        state: the prompt with its targets and active features.
        options: what counts as an edge.
        baseline: another prompt of as many tokens whose feature values attributions start from;
            None for zero.
        progress: called with (blocks done, blocks in all).

    Raises:
        ConfigError: no target was given, an option does not fit, or the baseline's length differs.
        CapabilityError: gradients cannot pass a block, or the variant needs what the family lacks.
    """
    options = options or DiscoverOptions()
    _check(state, options, baseline)
    n_positions = 1 + max(target.target.position for target in state.targets)
    chunk = options.chunk or _chunk(state, n_positions)
    best = [_Best() for _ in state.targets]
    top = max(target.row for target in state.targets)
    lowest = min((layer.row for layer in state.layers.values()), default=top)
    pullback = Pullback(
        state, variant=options.variant, n_positions=n_positions, chunk=chunk, lowest=lowest
    )
    by_row = {layer.row: layer for layer in state.layers.values()}
    order = sorted(range(len(state.targets)), key=lambda index: -state.targets[index].row)
    joined = 0
    wide = torch.promote_types(state.residuals.dtype, torch.float32)
    cotangents = state.residuals.new_zeros((0, n_positions, state.model.d_model), dtype=wide)
    made = choose(options.products, device=state.model.device)
    with torch.no_grad(), matrix_products(made):
        for row in range(top, lowest, -1):
            new = [state.targets[i] for i in order[joined:] if state.targets[i].row == row]
            joined += len(new)
            reads = torch.stack([target.read for target in new]).to(cotangents) if new else None
            positions = [target.target.position for target in new]
            cotangents = pullback.through(row - 1, cotangents, reads, positions)
            layer = by_row.get(row - 1)
            if layer is not None:
                values = layer.values.double() - _baseline(layer, baseline)
                slopes = project(layer, cotangents)
                at = [state.targets[index].target.position for index in order[:joined]]
                found = _strongest(layer, slopes, values, at, options)
                for index, (edges, total) in zip(order[:joined], found, strict=True):
                    best[index].offer(edges, total)
                if options.error == "frozen":
                    cotangents = through_features(layer, cotangents)
            if progress is not None:
                progress(top - row + 1, top - lowest)
    rows = [
        row
        for target, found in zip(state.targets, best, strict=True)
        for row in found.rows(state, target, options)
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def project(
    layer: ActiveFeatures, cotangents: Float[Tensor, "target pos d_model"]
) -> Float[Tensor, "target entry"]:
    """Return every gradient's product with the write direction of every active feature, float64."""
    found = torch.zeros(len(cotangents), len(layer), dtype=torch.float64)
    which = layer.which.to(layer.directions.device)
    given = cotangents.to(layer.directions)
    for positions in torch.arange(cotangents.shape[1]).split(_GATHERED):
        entries = [layer.at(position) for position in positions.tolist()]
        first, end = entries[0].start, entries[-1].stop
        directions = layer.directions[which[first:end]]
        onto = [
            given[:, position] @ directions[here.start - first : here.stop - first].T
            for position, here in zip(positions.tolist(), entries, strict=True)
        ]
        found[:, first:end] = torch.cat(onto, dim=1)
    return found


def through_features(
    layer: ActiveFeatures, cotangents: Float[Tensor, "target pos d_model"]
) -> Float[Tensor, "target pos d_model"]:
    """Return cotangents pulled back through a dictionary's reconstruction, its error held fixed.

    Raises:
        ConfigError: the state was made without the features' read rows.
    """
    if layer.reads is None:
        raise ConfigError("error='frozen' needs read rows: make the state with keep_reads=True")
    pulled = torch.zeros_like(cotangents)
    for position in range(cotangents.shape[1]):
        which = layer.which[layer.at(position)].to(layer.directions.device)
        onto = cotangents[:, position].to(layer.directions) @ layer.directions[which].T
        pulled[:, position] = (onto @ layer.reads[which]).to(pulled)
    return pulled


def _strongest(
    layer: ActiveFeatures,
    gradients: Float[Tensor, "target entry"],
    values: Float[Tensor, " entry"],
    at: Sequence[int],
    options: DiscoverOptions,
) -> Iterator[tuple[Float[Tensor, "edge 7"], float]]:
    """Weigh the active features of a layer for every target.

    Returns:
        Of each target: what can be among its strongest edges, ties included, with the columns
        score, layer, id, position, J, attribution, entry of the layer; and the sum of all
        absolute attributions.
    """
    ends = torch.tensor(at)[:, None]
    sources = layer.positions == ends if options.positions == "last" else layer.positions <= ends
    attributions = gradients * values
    totals = torch.where(sources, attributions.abs(), 0.0).sum(dim=1)
    scores = {
        "attribution": attributions.abs(),
        "gradient": gradients.abs(),
        "activation": layer.values.double().expand_as(gradients),
    }[options.order]
    allowed = sources & (gradients.abs() > options.min_gradient)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if len(layer) > options.top_k:
        allowed &= scores >= scores.topk(options.top_k, dim=1).values[:, -1:]
    target, entry = allowed.nonzero(as_tuple=True)
    columns = (
        scores[target, entry],
        torch.full_like(scores[target, entry], layer.layer),
        layer.ids[entry].double(),
        layer.positions[entry].double(),
        gradients[target, entry],
        attributions[target, entry],
        entry.double(),
    )
    counts = allowed.sum(dim=1).tolist()
    return zip(torch.stack(columns, dim=1).split(counts), totals.tolist(), strict=True)


class _Best:
    """The strongest edges into one target."""

    def __init__(self) -> None:
        self._total = 0.0
        self._offered: list[Float[Tensor, "edge 7"]] = []

    def offer(self, edges: Float[Tensor, "edge 7"], total: float) -> None:
        """Take what one layer has, see `_strongest`."""
        self._offered.append(edges)
        self._total += total

    def _kept(self, top_k: int) -> list[list[float]]:
        """Return the strongest; ties by layer, feature, position, so that there is one result."""
        edges: list[list[float]] = torch.cat(self._offered).tolist() if self._offered else []
        return sorted(edges, key=_order)[:top_k]

    def rows(
        self, state: PromptState, target: TargetState, options: DiscoverOptions
    ) -> list[tuple[object, ...]]:
        """Return rows of the edge table, strongest first."""
        found: list[tuple[object, ...]] = []
        feature, at = target.target.feature, target.target.position
        for _, layer, source, position, slope, attribution, entry in self._kept(options.top_k):
            share = abs(attribution) / self._total if self._total else 0.0
            if share < options.min_share:
                continue
            value = state.layers[int(layer)].values[int(entry)]
            found.append(
                (
                    state.prompt_id,
                    feature.space,
                    int(layer),
                    int(source),
                    int(position),
                    state.tokens[int(position)],
                    float(value),
                    feature.layer,
                    feature.feature_id,
                    at,
                    state.tokens[at],
                    target.pre_activation,
                    target.activation,
                    target.active,
                    options.variant,
                    options.error,
                    slope,
                    attribution,
                    share,
                    len(found) + 1,
                )
            )
        return found


def _order(edge: list[float]) -> tuple[float, ...]:
    return -edge[0], *edge[1:4]


def _baseline(layer: ActiveFeatures, baseline: PromptState | None) -> Float[Tensor, " entry"]:
    """Return the value of every entry on the baseline prompt, zero where it is inactive there."""
    found = torch.zeros(len(layer), dtype=torch.float64)
    if baseline is None:
        return found
    other = baseline.layers[layer.layer]
    known = {
        (position, feature): value
        for position, feature, value in zip(
            other.positions.tolist(), other.ids.tolist(), other.values.tolist(), strict=True
        )
    }
    for entry, key in enumerate(zip(layer.positions.tolist(), layer.ids.tolist(), strict=True)):
        found[entry] = known.get(key, 0.0)
    return found


def _check(state: PromptState, options: DiscoverOptions, baseline: PromptState | None) -> None:
    if not state.targets:
        raise ConfigError("no target: name the features whose drivers are wanted")
    if baseline is not None and baseline.n_positions != state.n_positions:
        raise ConfigError(
            f"the baseline prompt has {baseline.n_positions} tokens, this one has "
            f"{state.n_positions}; attributions between prompts need as many"
        )
    kept = [layer.reads is not None for layer in state.layers.values()]
    if options.error == "frozen" and not all(kept):
        raise ConfigError("error='frozen' needs read rows: make the state with keep_reads=True")


def _chunk(state: PromptState, n_positions: int) -> int:
    """Return how many cotangents a backward pass holds in about 256 MiB."""
    width = state.model.d_model
    per_target = n_positions * 4 * width * 12  # the MLP's width, three tensors of it, is the peak
    return max(1, min(256, 2**28 // per_target))
