"""An attribution graph in the JSON that circuit-tracer's and Neuronpedia's viewers read."""

from __future__ import annotations

from typing import Any

from layerscope.experiments.neuronpedia import ViewerNode, viewer_file
from layerscope.experiments.units import Outcome

_DESCRIPTIONS = {
    "transcoders": "Transcoder features; MLP errors are what transcoders leave.",
    "residual dictionaries": "Features of dictionaries of the residual stream, though the viewer "
    "calls them transcoders; errors are what a dictionary leaves, and (number -2) what an MLP "
    "writes beyond its tangent.",
}


def viewer_graph(outcome: Outcome, *, scan: str, n_layers: int) -> dict[str, Any]:
    """Return the graph as JSON values.

    Args:
        outcome: of `execute`. scan: name of the model. n_layers: of the model.
    """
    summary, options = outcome.summary, outcome.summary["options"]
    nodes: list[ViewerNode] = []
    for row in outcome.tables["nodes"].iter_rows(named=True):
        kind, position = row["kind"], row["position"]
        index = summary["prompt_ids"][position] if kind == "token" else row["feature_id"] or 0
        nodes.append(
            ViewerNode(
                kind=kind,
                layer=row["layer"],
                position=position,
                index=index,
                label=row["token"] if kind == "logit" else row["promotes"],
                influence=row["cumulative"],
                activation=row["activation"] if kind == "feature" else None,
                probability=row["activation"] if kind == "logit" else 0.0,
            )
        )
    return viewer_file(
        nodes,
        outcome.tables["edges"].iter_rows(),
        name=f"{summary['basis']}-{summary['prompt']}",
        scan=scan,
        n_layers=n_layers,
        prompt=summary["prompt"],
        tokens=summary["prompt_tokens"],
        description=_DESCRIPTIONS[summary["basis"]],
        node_share=options["node_share"],
        settings={
            "max_n_logits": options["logits"],
            "desired_logit_prob": options["logit_mass"],
            "max_feature_nodes": options["max_features"],
            "largest_residual": summary["largest_residual"],
            "replacement_score": summary["replacement_score"],
            "drawn_share_of_influence": summary["drawn_share_of_influence"],
            "products": summary["products"]["precision"],
        },
        pruning={
            "node_threshold": options["node_share"],
            "edge_threshold": options["edge_share"],
        },
    )
