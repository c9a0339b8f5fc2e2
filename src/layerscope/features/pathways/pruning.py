"""What of an attribution graph is kept, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError

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
    "residual": pl.Float64,
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
    """

    max_features: int = 256
    logits: int = 5
    logit_mass: float = 0.95
    node_share: float = 0.8
    edge_share: float = 0.98

    def __post_init__(self) -> None:
        shares = (self.logit_mass, self.node_share, self.edge_share)
        if self.max_features < 1 or self.logits < 1 or not all(0 < share <= 1 for share in shares):
            raise ConfigError("max_features and logits must be positive, shares in 0 to 1")


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
    edges: dict[tuple[str, int, int, int], float] = field(default_factory=dict)


def prune(nodes: Sequence[Node], options: GraphOptions) -> dict[Key, float]:
    """Return the sources to keep, with their influence on the logits.

    Influence goes down the graph, each node handing its own to its sources by their share of its
    absolute attributions.
    """
    influence: dict[Key, float] = {}
    for node in nodes:  # from the top down, as they were expanded
        own = influence.get(key_of(node), 0.0) if node.kind == "feature" else node.activation
        node.influence = own
        for source, weight in node.edges.items():
            share = abs(weight) / node.inbound if node.inbound else 0.0
            influence[source] = influence.get(source, 0.0) + own * share
    order = sorted(influence, key=lambda key: (-influence[key], key))
    total, so_far = sum(influence.values()), 0.0
    kept: dict[Key, float] = {}
    for source in order:
        if so_far >= options.node_share * total:
            break
        kept[source] = influence[source]
        so_far += influence[source]
    # Edges into nodes that stay, strongest first, until the share is reached.
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
        if so_far >= options.edge_share * whole:
            break
        wanted.add((place, source))
        so_far += size
    for place, node in enumerate(nodes):
        node.edges = {
            source: weight for source, weight in node.edges.items() if (place, source) in wanted
        }
    return kept


def key_of(node: Node) -> Key:
    """Return what identifies a node among the sources of others."""
    return (node.kind, node.layer, node.feature, node.position)


def tables(
    nodes: Sequence[Node],
    residuals: Sequence[float],
    kept: dict[Key, float],
    tokens: Sequence[str],
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the tables of nodes and edges; edges name nodes by their number."""
    expanded = {
        key_of(node): (node, residual)
        for node, residual in zip(nodes, residuals, strict=True)
        if node.kind == "logit" or key_of(node) in kept
    }
    keys = [*expanded, *(key for key in kept if key not in expanded)]
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
                kept.get(key, 0.0 if node is None else node.influence),
                residual,
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
