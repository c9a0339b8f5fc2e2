"""Pathways of one prompt in the JSON that Neuronpedia's graph viewer reads.

The schema is that of circuit-tracer's files: ``metadata``, ``qParams``, ``nodes``, ``links``, with
feature nodes named ``layer_feature_position``. The viewer knows one kind of feature node, for
transcoders; ours are features of the residual stream, which ``metadata`` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.experiments.pathways.graph import SUPPORTED, influences

_KIND = "cross layer transcoder"


def viewer_graph(
    edges: pl.DataFrame,
    *,
    prompt_id: str,
    prompt: str,
    tokens: Sequence[str],
    scan: str,
    labels: Mapping[tuple[int, int], str],
) -> dict[str, Any]:
    """Return one prompt's supported edges as the viewer's JSON.

    Args:
        edges: settled edges of all prompts. prompt_id: whose are shown.
        prompt: its text. tokens: its tokens, BOS included.
        scan: name of the model. labels: what to write on features, by (layer, feature_id).
    """
    kept = edges.filter((pl.col("prompt_id") == prompt_id) & pl.col("verdict").is_in(SUPPORTED))
    nodes: dict[tuple[int, int, int], float | None] = {}
    links: list[dict[str, Any]] = []
    pairs: list[tuple[Any, Any, float]] = []
    for row in kept.iter_rows(named=True):
        source = (row["source_layer"], row["source_id"], row["source_position"])
        target = (row["target_layer"], row["target_id"], row["target_position"])
        nodes[source] = row["source_activation"]
        nodes[target] = row["target_activation"]
        links.append({"source": _id(source), "target": _id(target), "weight": row["attribution"]})
        pairs.append((source, target, row["attribution"]))
    share = influences(sorted(nodes), pairs)
    whole = sum(share.values()) or 1.0
    return {
        "metadata": {
            "slug": _slug(f"{scan}-{prompt_id}"),
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": list(tokens),
            "prompt": prompt,
            "node_threshold": None,
            "schema_version": 1,
            "info": {
                "generator": {"name": "layerscope"},
                "description": "Feature pathways of the residual stream, each replayed; weights "
                "are attributions to the target's pre-activation.",
                "variants": sorted(kept["variant"].unique().to_list()),
                "error_modes": sorted(kept["error_mode"].unique().to_list()),
            },
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [
            {
                "node_id": _id(node),
                "feature": _paired(node[0], node[1]),
                "layer": str(node[0]),
                "ctx_idx": node[2],
                "feature_type": _KIND,
                "token_prob": 0.0,
                "is_target_logit": False,
                "run_idx": 0,
                "reverse_ctx_idx": 0,
                "jsNodeId": f"{node[0]}_{node[1]}-0",
                "clerp": labels.get((node[0], node[1]), ""),
                "influence": share[node] / whole,
                "activation": nodes[node],
            }
            for node in sorted(nodes)
        ],
        "links": links,
    }


def _id(node: tuple[int, int, int]) -> str:
    return f"{node[0]}_{node[1]}_{node[2]}"


def _paired(layer: int, feature: int) -> int:
    """Return Cantor's number of a pair, which is how the viewer tells features apart."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
