"""One prompt, one graph, held against the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.provenance import Stopwatch
from layerscope.experiments.units import (
    Outcome,
    Piece,
    Progress,
    UnitStore,
    Work,
    describe_run,
    run_units,
    work_key,
)
from layerscope.features import DictionarySet, open_set
from layerscope.features.pathways import (
    GraphOptions,
    agreement_of,
    attribution_graph,
    check_graph,
)
from layerscope.features.pathways.graph_checks import CHECK_SCHEMA
from layerscope.features.pathways.pruning import EDGE_SCHEMA
from layerscope.models import LanguageModel

EXPERIMENT = "attribution_graph"
# Sums that miss a node by more than this share of their largest term do not explain it.
COMPLETE = 1e-3
AGREEING = 0.8  # signs of edges that must agree with the model
MOSTLY = 0.5  # of influence that reaches tokens, and that is drawn


@dataclass(frozen=True)
class GraphPlan:
    """A graph that is ready to be made.

    Attributes:
        checked: features that are taken away to hold the graph against the model.
    """

    model: LanguageModel
    prompt: str
    dictionaries: DictionarySet
    options: GraphOptions
    checked: int = 24

    def config(self) -> dict[str, Any]:
        """Return everything that decides the graph, JSON-able."""
        return {
            **asdict(self.options),
            "prompt": self.prompt,
            "checked": self.checked,
            "dictionaries": [
                {"layer": each.layer, "features": each.n_features, "convention": each.convention}
                for each in self.dictionaries
            ],
        }


def plan(
    model: LanguageModel,
    prompt: str,
    dictionaries: DictionarySet | str | Path,
    options: GraphOptions | None = None,
    *,
    layers: Sequence[int] | None = None,
    checked: int = 24,
) -> GraphPlan:
    """Open the dictionaries by their headers; raises what opening and tokenising raise."""
    if not isinstance(dictionaries, DictionarySet):
        dictionaries = open_set(dictionaries, layers=layers)
    for each in dictionaries:
        each.require_model(model)
    model.tokenize(prompt)
    return GraphPlan(model, prompt, dictionaries, options or GraphOptions(), checked)


def execute(
    planned: GraphPlan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Make the graph and check it; tables ``nodes``, ``edges`` and ``checks``."""
    watch = Stopwatch()

    def work() -> Piece:
        model, prompt, dictionaries = planned.model, planned.prompt, planned.dictionaries
        graph = attribution_graph(model, prompt, dictionaries, planned.options)
        checks = check_graph(model, prompt, dictionaries, graph, features=planned.checked)
        tables = {"edges": graph.edges, "checks": checks}
        return Piece(
            graph.nodes,
            {
                **{name: table.to_dict(as_series=False) for name, table in tables.items()},
                "summary": graph.summary,
            },
        )

    key = work_key(EXPERIMENT, planned.config(), planned.model.provenance())
    piece = run_units([Work(key, work)], units=units, progress=progress)[0]
    edges = pl.DataFrame(piece.payload["edges"], schema=EDGE_SCHEMA)
    checks = pl.DataFrame(piece.payload["checks"], schema=CHECK_SCHEMA)
    watch.lap("graph")
    summary: dict[str, Any] = {**piece.payload["summary"], "prompt": planned.prompt}
    summary["checks"] = agreement_of(checks)
    agreeing = summary["checks"]["edge"]["sign_agreement"]
    summary["gates"] = {
        "complete": summary["largest_residual"] <= COMPLETE,
        "edges_agree": None if agreeing is None else agreeing >= AGREEING,
    }
    return Outcome(
        {"nodes": piece.rows, "edges": edges, "checks": checks},
        summary,
        describe_run(
            EXPERIMENT,
            planned.model,
            planned.config(),
            watch,
            read=[planned.model.tokenize(planned.prompt).row_ids(0)],
        ),
    )


def reasons(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what a reader has to know before believing a graph."""
    found: list[dict[str, str]] = []

    def say(severity: str, message: str, action: str) -> None:
        found.append({"severity": severity, "message": message, "action": action})

    if not summary["gates"]["complete"]:
        say(
            "high",
            f"Some node is off the sum of its sources by {summary['largest_residual']:.2g} of its "
            "largest source.",
            "Run in float32; a norm or attention that is not held may be the cause.",
        )
    edges, logits = summary["checks"]["edge"], summary["checks"]["logit"]
    if edges["n"]:
        agrees = edges["sign_agreement"]
        say(
            "low" if summary["gates"]["edges_agree"] else "high",
            f"Taking features away moved the targets of {edges['n']} edges: {agrees:.0%} in the "
            f"direction that the graph says, by {edges['slope']:.2f} of what it says.",
            "Believe single edges as far as their own check goes.",
        )
    if logits["n"] and abs(logits["slope"] - 1) > MOSTLY:
        say(
            "medium",
            f"Removed from the living model, features moved the logit by {logits['slope']:.2f} of "
            f"what the graph says ({logits['sign_agreement']:.0%} in its direction): later layers "
            "make up for them, or norms scale.",
            "Take effects on the logit from the checks, not from the graph.",
        )
    ends, score = summary["influence_ends"], summary["replacement_score"]
    if score < MOSTLY:
        say(
            "medium",
            f"{score:.0%} of the influence, biases aside, comes from tokens through features: "
            f"{ends['errors']:.0%} is in what dictionaries leave, {ends['mlp']:.0%} beyond MLPs' "
            f"tangents, {ends['features']:.0%} in features that were not expanded.",
            "Raise --max-features; dictionaries that explain more would help most.",
        )
    if summary["drawn_share_of_influence"] < MOSTLY:
        say(
            "medium",
            f"Edges that are drawn carry {summary['drawn_share_of_influence']:.0%} of what flows "
            "into nodes.",
            "Raise --max-features, --node-share or --edge-share.",
        )
    say(
        "low",
        "Attention patterns and norms are held fixed: why attention looks where it does is not in "
        "the graph, and an edit in the real model may do otherwise.",
        "Patch or replay what you want to claim.",
    )
    return found
