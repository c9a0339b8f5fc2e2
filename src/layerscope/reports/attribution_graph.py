"""The page of an attribution graph: what stands behind the next token, and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.attribution_graph.run import reasons
from layerscope.experiments.units import Outcome
from layerscope.reports.page import (
    Bars,
    Figures,
    HeatMap,
    Lines,
    Multiples,
    Part,
    Reasons,
    Section,
    Table,
    Text,
    Widget,
    write_page,
)

_LISTED = 60
_CHECKED = 200
_ENDS = {
    "tokens": "tokens",
    "errors": "what dictionaries leave",
    "mlp": "MLPs beyond their tangent",
    "features": "features not expanded",
    "biases": "biases",
}


def write_attribution_graph(outcome: Outcome, path: Path) -> Path:
    """Write the page of a graph and return its path."""
    summary, nodes, edges = outcome.summary, outcome.tables["nodes"], outcome.tables["edges"]
    checks = outcome.tables["checks"]
    logits = nodes.filter(pl.col("kind") == "logit")
    next_tokens = Bars(
        [f"“{token}”" for token in logits["token"]],
        logits["activation"].to_list(),
        "Probability of the next tokens that are explained.",
    )
    ends: Mapping[str, float] = summary["influence_ends"]
    where = Bars(
        [_ENDS[name] for name in ends if ends[name] or name != "mlp"],
        [ends[name] for name in ends if ends[name] or name != "mlp"],
        "Where the next tokens' influence ends, as shares: all that does not end in tokens is not "
        "explained.",
    )
    sections = [
        Section("How far to believe it", [_figures(outcome), Reasons(reasons(summary))]),
        Section("The graph", [_widget(outcome), Text([_LEGEND])]),
        Section("What is explained, and from where", [Multiples([next_tokens, where])]),
    ]
    if checks.height:
        sections.append(_checks(checks, nodes))
    sections += [
        Section("By layer and token", [_map(nodes, summary["prompt_tokens"])]),
        Section("Nodes and edges", [_nodes(nodes), _edges(nodes, edges)]),
    ]
    return write_page(
        path,
        title=summary["prompt"],
        kicker=f"attribution graph · {summary['basis']}",
        verdict=_verdict(summary, logits),
        sections=sections,
        provenance=outcome.provenance,
    )


def _verdict(summary: Mapping[str, Any], logits: pl.DataFrame) -> str:
    token = logits["token"][0]
    edge = summary["checks"]["edge"]
    checked = (
        f" Of {edge['n']} edges checked in the model, {edge['sign_agreement']:.0%} go the way the "
        "graph says."
        if edge["n"]
        else ""
    )
    return (
        f"“{token}” follows with {logits['activation'][0]:.0%}; "
        f"{summary['replacement_score']:.0%} of its influence, biases aside, comes from the "
        f"prompt's tokens through features.{checked}"
    )


def _figures(outcome: Outcome) -> Figures:
    summary, edge = outcome.summary, outcome.summary["checks"]["edge"]
    nodes, edges = outcome.tables["nodes"], outcome.tables["edges"]
    return Figures(
        [
            ("nodes", nodes.height, f"{summary['expanded_nodes']} expanded"),
            ("edges", edges.height, ""),
            ("active features", summary["active_features"], ""),
            ("largest residual", summary["largest_residual"], "of a node's largest source"),
            ("replacement score", summary["replacement_score"], "from tokens through features"),
            ("influence drawn", summary["drawn_share_of_influence"], "of what flows into nodes"),
            ("signs right", edge["sign_agreement"], f"{edge['n']} edges checked"),
        ]
    )


_LEGEND = (
    "Columns are the prompt's tokens, rows the blocks, the next tokens on top. Circles are "
    "features, diamonds what is not explained, squares tokens; size is influence. Blue edges raise "
    "their target, orange ones lower it; width is the influence that they carry."
)
_STYLE = (
    ".graph-controls{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;align-items:center;"
    "font-size:.86rem;margin:.6rem 0}.graph-controls input[type=number]{width:5em}"
    ".graph-panel{min-height:9em;font-size:.86rem;border:1px solid var(--line);border-radius:4px;"
    "padding:.4rem .7rem;background:var(--panel);overflow-wrap:anywhere}"
    ".graph-panel div:first-child{font-weight:600}"
    "#graph-view svg{width:100%;touch-action:none;user-select:none;margin-top:.5rem}"
    "#graph-view .rule{stroke:var(--line);stroke-width:.6}"
    "#graph-view .edge{fill:none}#graph-view .edge.up{stroke:var(--pos)}"
    "#graph-view .edge.down{stroke:var(--neg)}#graph-view .edge:hover{opacity:1}"
    "#graph-view .node{cursor:grab}#graph-view circle{fill:var(--accent);stroke:var(--bg)}"
    "#graph-view .node path{fill:var(--bg);stroke:var(--muted);stroke-width:1.3}"
    "#graph-view .node rect{fill:var(--ink);stroke:var(--bg)}"
    "#graph-view .node:hover>*{stroke:var(--ink);stroke-width:1.6}"
    "#graph-view .chosen>*{stroke:var(--ink);stroke-width:2.4}"
    "#graph-view .node text{fill:var(--ink);stroke:none!important;font-weight:600}"
    "#graph-view .token{fill:var(--ink)}"
)
_HTML = (
    '<div id="graph-view"><div class="graph-controls">'
    '<label>from <select data-control="low"></select></label>'
    '<label>to <select data-control="high"></select></label>'
    '<label>strongest edges <input type="range" min="1" data-control="count"></label>'
    '<label>|attribution| at least <input type="number" min="0" step="any" value="0" '
    'data-control="weight"></label>'
    '<label><input type="checkbox" data-control="errors" checked> what is not explained</label>'
    '<label><input type="checkbox" data-control="only"> only of the clicked node</label>'
    '<button type="button" data-control="reset">arrange anew</button><span data-status></span>'
    '</div><div class="graph-panel" data-panel></div>'
    '<svg role="img" aria-label="attribution graph by token and block"></svg></div>'
)  # fmt: skip


def _widget(outcome: Outcome) -> Widget:
    nodes, checks = outcome.tables["nodes"], outcome.tables["checks"]
    measured = {
        (kind, source, target): (change, random)
        for kind, source, target, _, change, random in checks.iter_rows()
    }
    rows: list[dict[str, Any]] = []
    for row in nodes.iter_rows(named=True):
        found = measured.get(("logit", row["node"], 0))
        rows.append(row if found is None else {**row, "measured": found[0]})
    influence = dict(nodes.select("node", "influence").iter_rows())
    edges: list[dict[str, Any]] = []
    into = outcome.tables["edges"].with_columns(
        share=pl.col("weight").abs() / pl.col("weight").abs().sum().over("target")
    )
    for source, target, weight, share in into.iter_rows():
        edge = {"source": source, "target": target, "weight": weight, "share": share}
        edge["flow"] = share * influence[target]
        found = measured.get(("edge", source, target))
        if found is not None:
            edge |= {"measured": found[0], "random": found[1]}
        edges.append(edge)
    data = {"nodes": rows, "edges": edges, "tokens": outcome.summary["prompt_tokens"]}
    script = Path(__file__).parent / "templates" / "attribution_graph.js"
    return Widget(
        "attribution-graph", data, script.read_text(encoding="utf-8"), html=_HTML, style=_STYLE
    )


def _checks(checks: pl.DataFrame, nodes: pl.DataFrame) -> Section:
    names = _names(nodes)
    drawings: list[HeatMap | Lines | Bars] = []
    for kind, caption in (
        ("edge", "Edges: the change of the target when the source is taken away. Equal is right."),
        ("logit", "The change of the first logit by all paths when a feature is taken away."),
    ):
        part = checks.filter(kind=kind)
        series = {
            "measured": list(part.select("predicted", "measured").iter_rows()),
            "size of a random direction's": list(part.select("predicted", "random").iter_rows()),
        }
        drawings.append(
            Lines(series, "predicted by the graph", "measured in the model", caption, points=True)
        )
    parts: list[Part] = [Multiples(drawings)]
    rows = [
        (row["kind"], names[row["source"]], names[row["target"]], row["predicted"],
         row["measured"], row["random"])
        for row in checks.sort(pl.col("predicted").abs(), descending=True)
        .head(_CHECKED).iter_rows(named=True)
    ]  # fmt: skip
    columns = ("kind", "taken away", "target", "predicted", "measured", "random direction")
    parts.append(Table(columns, rows, "Checks, strongest predictions first", folded=True))
    return Section(
        "The graph against the model",
        parts,
        "The features of most influence are taken out of the real model, one by one, attention and "
        "norms live. Random directions of equal length show what any edit would do.",
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
        ["embedding" if layer < 0 else f"block {layer}" for layer in layers],
        [f"{at} {token}" for at, token in enumerate(tokens)],
        "Influence on the explained tokens of the nodes that are kept, by layer and position.",
        unit="influence",
    )


def _nodes(nodes: pl.DataFrame) -> Table:
    top = nodes.sort("influence", descending=True).head(_LISTED)
    columns = (
        "kind", "layer", "feature_id", "position", "token", "activation", "influence", "effect",
        "promotes",
    )  # fmt: skip
    return Table(columns, [list(row) for row in top.select(columns).iter_rows()], "Nodes")


def _names(nodes: pl.DataFrame) -> dict[int, str]:
    return {
        row["node"]: f"{row['kind']} {row['layer']}"
        + ("" if row["feature_id"] is None else f"/{row['feature_id']}")
        + f" at {row['position']} “{row['token']}”"
        for row in nodes.iter_rows(named=True)
    }


def _edges(nodes: pl.DataFrame, edges: pl.DataFrame) -> Table:
    names = _names(nodes)
    top = edges.sort(pl.col("weight").abs(), descending=True).head(_LISTED)
    rows = [[names[source], names[target], weight] for source, target, weight in top.iter_rows()]
    return Table(("source", "target", "attribution"), rows, "Strongest edges")
