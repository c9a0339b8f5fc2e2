"""The page of an attribution graph: what stands behind the next token, and how complete it is."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from layerscope.experiments.attribution_graph.run import reasons
from layerscope.experiments.units import Outcome
from layerscope.reports.page import Bars, Figures, HeatMap, Reasons, Section, Table, write_page

_LISTED = 60


def write_attribution_graph(outcome: Outcome, path: Path) -> Path:
    """Write the page of a graph and return its path."""
    summary, nodes, edges = outcome.summary, outcome.tables["nodes"], outcome.tables["edges"]
    logits = nodes.filter(pl.col("kind") == "logit")
    figures = Figures(
        [
            ("nodes", nodes.height, f"{summary['expanded_nodes']} expanded"),
            ("edges", edges.height, ""),
            ("active features", summary["active_features"], ""),
            ("largest residual", summary["largest_residual"], "of a node's largest source"),
            ("drawn share of attribution", summary["drawn_share_of_attribution"], ""),
        ]
    )
    next_tokens = Bars(
        [f"“{token}”" for token in logits["token"]],
        logits["activation"].to_list(),
        "Probability of the next tokens that are explained.",
    )
    sections = [
        Section("How far to believe it", [figures, Reasons(reasons(summary))]),
        Section("What is explained", [next_tokens]),
        Section("Where it comes from", [_map(nodes, summary["prompt_tokens"])]),
        Section("Nodes and edges", [_nodes(nodes), _edges(nodes, edges)]),
    ]
    return write_page(
        path,
        title=summary["prompt"],
        kicker="attribution graph",
        sections=sections,
        provenance=outcome.provenance,
    )


def _map(nodes: pl.DataFrame, tokens: list[str]) -> HeatMap:
    """Influence by layer and position, the embedding at the bottom."""
    inner = nodes.filter(pl.col("kind") != "logit")
    sums = {
        (layer, position): value
        for layer, position, value in inner.group_by("layer", "position")
        .agg(pl.col("influence").sum())
        .iter_rows()
    }
    layers = sorted({layer for layer, _ in sums}, reverse=True)
    return HeatMap(
        [[sums.get((layer, at), 0.0) for at in range(len(tokens))] for layer in layers],
        ["embedding" if layer < 0 else f"layer {layer}" for layer in layers],
        [f"{at} {token}" for at, token in enumerate(tokens)],
        "Influence on the explained tokens of the nodes that are kept, by layer and position.",
        unit="influence",
    )


def _nodes(nodes: pl.DataFrame) -> Table:
    top = nodes.sort("influence", descending=True).head(_LISTED)
    columns = ("kind", "layer", "feature_id", "position", "token", "activation", "influence")
    return Table(columns, [list(row) for row in top.select(columns).iter_rows()], "Nodes")


def _edges(nodes: pl.DataFrame, edges: pl.DataFrame) -> Table:
    names = {
        row["node"]: f"{row['kind']} {row['layer']}"
        + ("" if row["feature_id"] is None else f"/{row['feature_id']}")
        + f" at {row['position']} “{row['token']}”"
        for row in nodes.iter_rows(named=True)
    }
    top = edges.sort(pl.col("weight").abs(), descending=True).head(_LISTED)
    rows = [[names[source], names[target], weight] for source, target, weight in top.iter_rows()]
    return Table(("source", "target", "attribution"), rows, "Strongest edges")
