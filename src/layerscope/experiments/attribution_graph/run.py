"""One prompt, one graph."""

from __future__ import annotations

from collections.abc import Mapping
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
from layerscope.features.pathways import GraphOptions, attribution_graph
from layerscope.models import LanguageModel

EXPERIMENT = "attribution_graph"
# Sums that miss a node by more than this share of their largest term do not explain it.
COMPLETE = 1e-3


@dataclass(frozen=True)
class GraphPlan:
    """A graph that is ready to be made."""

    model: LanguageModel
    prompt: str
    transcoders: DictionarySet
    options: GraphOptions

    def config(self) -> dict[str, Any]:
        """Return everything that decides the graph, JSON-able."""
        return {
            **asdict(self.options),
            "prompt": self.prompt,
            "transcoders": [
                {"layer": each.layer, "features": each.n_features, "convention": each.convention}
                for each in self.transcoders
            ],
        }


def plan(
    model: LanguageModel,
    prompt: str,
    transcoders: DictionarySet | str | Path,
    options: GraphOptions | None = None,
) -> GraphPlan:
    """Open the transcoders by their headers; raises what opening and tokenising raise."""
    if not isinstance(transcoders, DictionarySet):
        transcoders = open_set(transcoders)
    for each in transcoders:
        each.require_model(model)
    model.tokenize(prompt)
    return GraphPlan(model, prompt, transcoders, options or GraphOptions())


def execute(
    planned: GraphPlan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Make the graph; tables ``nodes`` and ``edges``."""
    watch = Stopwatch()

    def work() -> Piece:
        graph = attribution_graph(
            planned.model, planned.prompt, planned.transcoders, planned.options
        )
        edges = graph.edges.to_dict(as_series=False)
        return Piece(graph.nodes, {"edges": edges, "summary": graph.summary})

    key = work_key(EXPERIMENT, planned.config(), planned.model.provenance())
    piece = run_units([Work(key, work)], units=units, progress=progress)[0]
    schema = {"source": pl.Int64, "target": pl.Int64, "weight": pl.Float64}
    edges = pl.DataFrame(piece.payload["edges"], schema=schema)
    watch.lap("graph")
    summary: dict[str, Any] = {**piece.payload["summary"], "prompt": planned.prompt}
    summary["gates"] = {"complete": summary["largest_residual"] <= COMPLETE}
    return Outcome(
        {"nodes": piece.rows, "edges": edges},
        summary,
        describe_run(EXPERIMENT, planned.model, planned.config(), watch),
    )


def reasons(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what a reader has to know before believing a graph."""
    found: list[dict[str, str]] = []
    if not summary["gates"]["complete"]:
        found.append(
            {
                "severity": "high",
                "message": f"Some node is off the sum of its sources by "
                f"{summary['largest_residual']:.2g} of its largest source.",
                "action": "Run in float32; a norm or attention that is not held may be the cause.",
            }
        )
    drawn = summary["drawn_share_of_attribution"]
    if drawn is not None and drawn < 0.5:
        found.append(
            {
                "severity": "medium",
                "message": f"The graph draws {drawn:.0%} of all absolute attribution.",
                "action": "Raise --max-features, --node-share or --edge-share.",
            }
        )
    found.append(
        {
            "severity": "low",
            "message": "Attention patterns and norms are held fixed: why attention looks where it "
            "does is not in the graph, and an edit in the real model may do otherwise.",
            "action": "Patch or replay what you want to claim.",
        }
    )
    return found
