"""Pathways of one prompt in the JSON that circuit-tracer's and Neuronpedia's viewers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.experiments.neuronpedia import ViewerNode, viewer_file
from layerscope.experiments.pathways.graph import SUPPORTED, influences

_DESCRIPTION = (
    "Feature pathways of the residual stream, each replayed; the viewer calls features "
    "transcoders. Weights are attributions to the target's pre-activation."
)


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
    values: dict[tuple[int, int, int], float | None] = {}
    pairs: list[tuple[tuple[int, int, int], tuple[int, int, int], float]] = []
    for row in kept.iter_rows(named=True):
        source = (row["source_layer"], row["source_id"], row["source_position"])
        target = (row["target_layer"], row["target_id"], row["target_position"])
        values[source] = row["source_activation"]
        values[target] = row["target_activation"]
        pairs.append((source, target, row["attribution"]))
    cumulative = _cumulative(influences(sorted(values), pairs))
    order = sorted(values)
    place = {node: index for index, node in enumerate(order)}
    return viewer_file(
        [
            ViewerNode(
                kind="feature",
                layer=node[0],
                position=node[2],
                index=node[1],
                label=labels.get((node[0], node[1]), ""),
                influence=cumulative[node],
                activation=values[node],
            )
            for node in order
        ],
        [(place[source], place[target], weight) for source, target, weight in pairs],
        name=prompt_id,
        scan=scan,
        n_layers=1 + max((node[0] for node in order), default=0),
        prompt=prompt,
        tokens=tokens,
        description=_DESCRIPTION,
        settings={
            "variants": sorted(kept["variant"].unique().to_list()),
            "error_modes": sorted(kept["error_mode"].unique().to_list()),
        },
    )


def _cumulative(
    influence: Mapping[tuple[int, int, int], float],
) -> dict[tuple[int, int, int], float]:
    """Return the share of all influence that a node and stronger ones have."""
    whole, so_far = sum(influence.values()) or 1.0, 0.0
    found: dict[tuple[int, int, int], float] = {}
    for node in sorted(influence, key=lambda node: (-influence[node], node)):
        so_far += influence[node]
        found[node] = min(1.0, so_far / whole)
    return found
