"""What of an attribution graph is kept, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import polars as pl
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.products import Products

Key = tuple[str, int, int, int]
"""A node: kind, layer, feature (-1 for none), position."""

NODE_SCHEMA = {
    "node": pl.Int64,
    "kind": pl.String,
    "layer": pl.Int64,
    "feature_id": pl.Int64,
    "position": pl.Int64,
    "token": pl.String,
    "activation": pl.Float64,
    "influence": pl.Float64,
    "cumulative": pl.Float64,
    "effect": pl.Float64,
    "residual": pl.Float64,
    "promotes": pl.String,
}
EDGE_SCHEMA = {"source": pl.Int64, "target": pl.Int64, "weight": pl.Float64}


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """How large a graph is.

    Attributes:
        max_features: feature nodes that are expanded.
        logits: most likely next tokens that are explained, at most; fewer where they reach
            `logit_mass` together.
        node_share, edge_share: share of all influence that the nodes (edges) kept account for.
        products: of the sweep, not of the run that it explains: "checked" (the fastest
            float32-accurate product) or "default" (torch as found).
    """

    max_features: int = 512
    logits: int = 5
    logit_mass: float = 0.95
    node_share: float = 0.8
    edge_share: float = 0.98
    products: Products = "checked"

    def __post_init__(self) -> None:
        shares = (self.logit_mass, self.node_share, self.edge_share)
        if self.max_features < 1 or self.logits < 1 or not all(0 < share <= 1 for share in shares):
            raise ConfigError("max_features and logits must be positive, shares in 0 to 1")
        if self.products not in get_args(Products):
            raise ConfigError(f"unknown products {self.products!r}; use default or checked")


@dataclass(eq=False)
class Node:
    """A node whose sources are wanted."""

    kind: str
    layer: int
    feature: int
    position: int
    token: str
    value: float  # what its sources add up to
    activation: float
    influence: float
    constant: float  # known before the sweep: biases of reading
    cotangent: Float[Tensor, " d_model"]
    sums: float = 0.0
    largest: float = 0.0
    inbound: float = 0.0  # sum of absolute attributions
    unlisted: float = 0.0  # of it, by features that are no edges
    edges: dict[tuple[str, int, int, int], float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Pruned:
    """What stays of a graph.

    Attributes:
        kept: sources to keep, with their influence on the logits.
        cumulative: of each, the share of all influence that it and stronger ones have.
        effects: what the first logit owes to a source by all paths.
        ends: where the influence of the logits ends, as shares: "tokens", "errors", "mlp" (what is
            beyond a tangent), "features" (that were not expanded) and "biases".
    """

    kept: dict[Key, float]
    cumulative: dict[Key, float]
    effects: dict[Key, float]
    ends: dict[str, float]

    @property
    def replacement_score(self) -> float:
        """Share of influence that reaches tokens through features alone, biases set aside."""
        whole = sum(share for kind, share in self.ends.items() if kind != "biases")
        return self.ends["tokens"] / whole if whole else 0.0


def prune(
    nodes: Sequence[Node], options: GraphOptions, effects: dict[Key, float] | None = None
) -> Pruned:
    """Return what to keep; edges of nodes that are dropped, and weak ones, are taken away.

    Influence goes down the graph, each node handing its own to its sources by their share of its
    absolute attributions. What no longer reaches a logit is dropped as well. Effects on the first
    logit are products along paths unless they are given.
    """
    influence, ends = _influence(nodes)
    effects = _effects(nodes) if effects is None else effects
    order = sorted(influence, key=lambda key: (-influence[key], key))
    total, so_far = sum(influence.values()), 0.0
    kept: dict[Key, float] = {}
    cumulative: dict[Key, float] = {}
    for source in order:
        if so_far >= options.node_share * total:
            break
        kept[source] = influence[source]
        so_far += influence[source]
        cumulative[source] = min(1.0, so_far / total)
    wanted = _edges(nodes, kept, options.edge_share)
    reached: set[Key] = set()
    for place, node in enumerate(nodes):
        if node.kind != "logit" and key_of(node) not in reached:
            node.edges = {}
            continue
        node.edges = {
            source: weight for source, weight in node.edges.items() if (place, source) in wanted
        }
        reached |= set(node.edges)
    kept = {key: value for key, value in kept.items() if key in reached}
    return Pruned(kept, cumulative, effects, ends)


def _influence(nodes: Sequence[Node]) -> tuple[dict[Key, float], dict[str, float]]:
    """Return the influence of every source, and where it ends."""
    influence: dict[Key, float] = {}
    ends: dict[str, float] = {
        "tokens": 0.0, "errors": 0.0, "mlp": 0.0, "features": 0.0, "biases": 0.0,
    }  # fmt: skip
    expanded = {key_of(node) for node in nodes}
    names = {"token": "tokens", "error": "errors", "mlp": "mlp", "feature": "features"}
    for node in nodes:  # from the top down, as they were expanded
        own = influence.get(key_of(node), 0.0) if node.kind == "feature" else node.activation
        node.influence = own
        listed = 0.0
        for source, weight in node.edges.items():
            share = abs(weight) / node.inbound if node.inbound else 0.0
            influence[source] = influence.get(source, 0.0) + own * share
            listed += share
            if source not in expanded:
                ends[names[source[0]]] += own * share
        ends["features"] += own * node.unlisted / node.inbound if node.inbound else 0.0
        rest = 1.0 - listed - (node.unlisted / node.inbound if node.inbound else 0.0)
        ends["biases"] += own * max(0.0, rest)
    whole = sum(ends.values())
    return influence, {kind: value / whole if whole else 0.0 for kind, value in ends.items()}


def _effects(nodes: Sequence[Node]) -> dict[Key, float]:
    """Return what the first logit owes to every source by all paths through expanded features.

    Features are taken to pass changes on as they are, which those behind a threshold do.
    """
    effects: dict[Key, float] = {}
    for place, node in enumerate(nodes):
        if node.kind == "logit":
            slope = 1.0 if place == 0 else 0.0
        else:
            slope = effects.get(key_of(node), 0.0) / (node.activation or 1.0)
        if slope:
            for source, weight in node.edges.items():
                effects[source] = effects.get(source, 0.0) + slope * weight
    return effects


def _edges(
    nodes: Sequence[Node], kept: dict[Key, float], edge_share: float
) -> set[tuple[int, Key]]:
    """Return the edges into nodes that stay, strongest first, until they have their share."""
    ranked = sorted(
        (
            (node.influence * abs(weight) / node.inbound, place, source)
            for place, node in enumerate(nodes)
            if node.inbound and (node.kind == "logit" or key_of(node) in kept)
            for source, weight in node.edges.items()
            if source in kept
        ),
        key=lambda item: (-item[0], item[1:]),
    )
    whole, so_far = sum(item[0] for item in ranked), 0.0
    wanted: set[tuple[int, Key]] = set()
    for size, place, source in ranked:
        if so_far >= edge_share * whole:
            break
        wanted.add((place, source))
        so_far += size
    return wanted


def add(
    nodes: Sequence[Node],
    sums: Tensor,
    largest: Tensor | None = None,
    sizes: Tensor | None = None,
) -> None:
    """Add attributions to nodes: their sum, the largest size among them, and the sum of sizes."""
    for place, node in enumerate(nodes):
        node.sums += float(sums[place])
        size = abs(float(sums[place])) if largest is None else float(largest[place])
        node.largest = max(node.largest, size)
        node.inbound += abs(float(sums[place])) if sizes is None else float(sizes[place])


def key_of(node: Node) -> Key:
    """Return what identifies a node among the sources of others."""
    return (node.kind, node.layer, node.feature, node.position)


def tables(
    nodes: Sequence[Node],
    residuals: Sequence[float],
    pruned: Pruned,
    tokens: Sequence[str],
    promoted: Mapping[Key, str],
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the tables of nodes and edges; edges name nodes by their number."""
    expanded = {
        key_of(node): (node, residual)
        for node, residual in zip(nodes, residuals, strict=True)
        if node.kind == "logit" or key_of(node) in pruned.kept
    }
    keys = [*expanded, *(key for key in pruned.kept if key not in expanded)]
    number = {key: place for place, key in enumerate(keys)}
    rows: list[tuple[Any, ...]] = []
    for key in keys:
        kind, layer, feature, position = key
        node, residual = expanded.get(key, (None, None))
        token = tokens[position] if node is None or kind != "logit" else node.token
        rows.append(
            (
                number[key],
                kind,
                layer,
                feature if feature >= 0 else None,
                position,
                token,
                None if node is None else node.activation,
                pruned.kept.get(key, 0.0 if node is None else node.influence),
                pruned.cumulative.get(key, 1.0),
                pruned.effects.get(key),
                residual,
                promoted.get(key, ""),
            )
        )
    edges = [
        (number[source], number[key], weight)
        for key, (node, _) in expanded.items()
        for source, weight in node.edges.items()
    ]
    return (
        pl.DataFrame(rows, schema=NODE_SCHEMA, orient="row"),
        pl.DataFrame(edges, schema=EDGE_SCHEMA, orient="row"),
    )
