"""The graph of pathways: who drives whom, how strongly, and in which circles.

Edges go from lower to higher layers, so there is no cycle. Weights are attributions; for path sums
every target's incoming |weight| is normalised to 1, and a node's influence is the sum over all
paths to targets that drive nothing themselves, (I - A)^-1 applied to them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from xml.sax.saxutils import escape, quoteattr

import polars as pl

SUPPORTED = ("confirmed", "nonlinear")
_ROUNDS = 50

Node = tuple[int, int]
N = TypeVar("N", bound=tuple[int, ...])


@dataclass(frozen=True)
class Graph:
    """Nodes by (layer, feature_id), and edges between them, as JSON values."""

    nodes: list[dict[str, Any]]
    edges: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the graph as JSON values."""
        return {"directed": True, "nodes": self.nodes, "edges": self.edges}


def build(pathways: pl.DataFrame, features: Mapping[Node, Mapping[str, Any]]) -> Graph:
    """Build the graph of pathways that replay confirmed or found nonlinear.

    Args:
        pathways: one row per pair of features, over prompts.
        features: what is known of the selected features.
    """
    kept = pathways.filter(pl.col("verdict").is_in(SUPPORTED))
    edges = [
        {
            "source": f"L{row['source_layer']}-{row['source_id']}",
            "target": f"L{row['target_layer']}-{row['target_id']}",
            "weight": row["attribution"],
            "actual": row["actual"],
            "verdict": row["verdict"],
            "nonlinear": row["verdict"] == "nonlinear",
            "n_prompts": row["n_prompts"],
            "sign_consistency": row["sign_consistency"],
            "single_prompt": row["single_prompt"],
        }
        for row in kept.iter_rows(named=True)
    ]
    links = [
        ((row[0], row[1]), (row[2], row[3]), row[4])
        for row in kept.select(
            "source_layer", "source_id", "target_layer", "target_id", "attribution"
        ).iter_rows()
    ]
    names = sorted({end for link in links for end in link[:2]} | set(features))
    influence, circles = influences(names, links), communities(names, links)
    strengths: dict[Node, list[float]] = {name: [0.0, 0.0] for name in names}
    for source, target, weight in links:
        strengths[source][1] += abs(weight)
        strengths[target][0] += abs(weight)
    nodes = [
        {
            "id": f"L{name[0]}-{name[1]}",
            "layer": name[0],
            "feature_id": name[1],
            "selected": name in features,
            "cohen_d": features[name].get("cohen_d") if name in features else None,
            "side": features[name].get("side") if name in features else None,
            "strength_in": strengths[name][0],
            "strength_out": strengths[name][1],
            "influence": influence[name],
            "community": circles[name],
        }
        for name in names
    ]
    return Graph(nodes, edges)


def influences(nodes: Sequence[N], links: Sequence[tuple[N, N, float]]) -> dict[N, float]:
    """Return how much of the final targets every node accounts for, along all paths.

    Nodes are tuples that begin with their layer.
    """
    incoming: dict[N, float] = defaultdict(float)
    outgoing: dict[N, list[tuple[N, float]]] = defaultdict(list)
    for source, target, weight in links:
        incoming[target] += abs(weight)
        outgoing[source].append((target, abs(weight)))
    found: dict[N, float] = {}
    for node in sorted(nodes, reverse=True):  # layers descend: targets come before their sources
        if node not in outgoing:
            found[node] = 1.0 if node in incoming else 0.0
            continue
        found[node] = sum(
            weight / incoming[target] * found[target]
            for target, weight in outgoing[node]
            if incoming[target]
        )
    return found


def communities(
    nodes: Sequence[Node], links: Sequence[tuple[Node, Node, float]]
) -> dict[Node, int]:
    """Return circles of nodes that are tied to one another more than to others.

    Label propagation over |weights| (Raghavan, Albert and Kumara, 2007) in a fixed order, ties to
    the smaller label, so that the result is one and the same everywhere.
    """
    ties: dict[Node, list[tuple[Node, float]]] = defaultdict(list)
    for source, target, weight in links:
        ties[source].append((target, abs(weight)))
        ties[target].append((source, abs(weight)))
    label = {node: index for index, node in enumerate(nodes)}
    for _ in range(_ROUNDS):
        changed = False
        for node in nodes:
            votes: dict[int, float] = defaultdict(float)
            for other, weight in ties[node]:
                votes[label[other]] += weight
            if not votes:
                continue
            best = min(votes, key=lambda one: (-votes[one], one))
            if votes[best] > votes.get(label[node], 0.0):
                label[node], changed = best, True
        if not changed:
            break
    order = {old: new for new, old in enumerate(dict.fromkeys(label[node] for node in nodes))}
    return {node: order[label[node]] for node in nodes}


def graphml(graph: Graph) -> str:
    """Return the graph as GraphML, which networkx, Gephi, yEd and Cytoscape read."""
    keys: list[str] = []
    names: dict[tuple[str, str], str] = {}
    for kind, items in (("node", graph.nodes), ("edge", graph.edges)):
        for name in items[0] if items else ():
            if name in ("id", "source", "target"):
                continue
            values = [item[name] for item in items if item[name] is not None]
            key = f"{kind[0]}{len(names)}"
            names[kind, name] = key
            keys.append(
                f'  <key id="{key}" for="{kind}" attr.name={quoteattr(name)} '
                f'attr.type="{_type(values)}"/>'
            )
    body = [
        f"    <node id={quoteattr(node['id'])}>{_data('node', node, names)}</node>"
        for node in graph.nodes
    ]
    for edge in graph.edges:
        ends = f"source={quoteattr(edge['source'])} target={quoteattr(edge['target'])}"
        body.append(f"    <edge {ends}>{_data('edge', edge, names)}</edge>")
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">',
            *keys,
            '  <graph id="pathways" edgedefault="directed">',
            *body,
            "  </graph>",
            "</graphml>",
            "",
        ]
    )


def _type(values: Sequence[Any]) -> str:
    if values and all(isinstance(value, bool) for value in values):
        return "boolean"
    if values and all(isinstance(value, int) for value in values):
        return "long"
    if values and all(isinstance(value, int | float) for value in values):
        return "double"
    return "string"


def _data(kind: str, item: Mapping[str, Any], names: Mapping[tuple[str, str], str]) -> str:
    parts: list[str] = []
    for name, value in item.items():
        key = names.get((kind, name))
        if key is None or value is None or (isinstance(value, float) and not math.isfinite(value)):
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        parts.append(f'<data key="{key}">{escape(text)}</data>')
    return "".join(parts)
