"""A graph in the JSON that Neuronpedia's graph viewer reads (the schema of circuit-tracer)."""

from __future__ import annotations

import re
from typing import Any

from layerscope.experiments.units import Outcome

_KINDS = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}


def viewer_graph(outcome: Outcome, *, scan: str, n_layers: int) -> dict[str, Any]:
    """Return the graph as JSON values.

    Args:
        outcome: of `execute`. scan: name of the model. n_layers: of the model.
    """
    summary = outcome.summary
    names: dict[int, str] = {}
    nodes: list[dict[str, Any]] = []
    for row in outcome.tables["nodes"].iter_rows(named=True):
        layer = {"token": "E", "logit": str(n_layers)}.get(row["kind"], str(row["layer"]))
        feature = row["feature_id"] if row["feature_id"] is not None else 0
        name = f"{layer}_{feature}_{row['position']}"
        if row["kind"] == "error":
            name = f"0_error_{layer}_{row['position']}"
        names[row["node"]] = name
        nodes.append(
            {
                "node_id": name,
                "feature": _paired(row["layer"], feature) if row["kind"] == "feature" else None,
                "layer": layer,
                "ctx_idx": row["position"],
                "feature_type": _KINDS[row["kind"]],
                "run_idx": 0,
                "reverse_ctx_idx": 0,
                "jsNodeId": f"{layer}_{feature}-0",
                "token_prob": row["activation"] if row["kind"] == "logit" else 0.0,
                "is_target_logit": row["kind"] == "logit",
                "clerp": f'"{row["token"]}"' if row["kind"] != "feature" else "",
                "influence": row["influence"],
                "activation": row["activation"] if row["kind"] == "feature" else None,
            }
        )
    links = [
        {"source": names[source], "target": names[target], "weight": weight}
        for source, target, weight in outcome.tables["edges"].iter_rows()
    ]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{scan}-{summary['prompt']}".lower()).strip("-")[:60]
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": summary["prompt_tokens"],
            "prompt": summary["prompt"],
            "node_threshold": summary["options"]["node_share"],
            "schema_version": 1,
            "info": {
                "generator": {"name": "layerscope"},
                "largest_residual": summary["largest_residual"],
                "drawn_share_of_attribution": summary["drawn_share_of_attribution"],
            },
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
    }


def _paired(layer: int, feature: int) -> int:
    """Return Cantor's number of a pair, which is how the viewer tells features apart."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature
