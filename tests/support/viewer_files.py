"""What the viewers of circuit-tracer and Neuronpedia take for granted of a graph's JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What both readers declare: circuit-tracer 0.5 (frontend/graph_models.py) and Neuronpedia
# (api/graph/graph-schema.json), the stricter of the two for every field.
METADATA: Mapping[str, type] = {
    "slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str,
    "schema_version": int, "info": dict, "generation_settings": dict, "pruning_settings": dict,
}  # fmt: skip
Q_PARAMS: Mapping[str, type] = {
    "pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str,
}  # fmt: skip
NODE: Mapping[str, type | tuple[type, ...]] = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str,
    "token_prob": float, "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int,
    "jsNodeId": str, "clerp": str, "influence": (float, type(None)),
    "activation": (float, type(None)),
}  # fmt: skip
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


def check_viewer_file(graph: Mapping[str, Any]) -> None:
    """Assert all that the viewers take for granted."""
    assert json.loads(json.dumps(graph, allow_nan=False)) == graph
    assert set(graph) == {"metadata", "qParams", "nodes", "links"}
    metadata = graph["metadata"]
    threshold = metadata.get("node_threshold", 0.5)
    assert isinstance(threshold, float) and 0 < threshold <= 1
    for given, wanted in ((metadata, METADATA), (graph["qParams"], Q_PARAMS)):
        assert {name: type(given.get(name)) for name in wanted} == dict(wanted)
    assert all(isinstance(token, str) for token in metadata["prompt_tokens"])
    assert metadata["schema_version"] == 1
    ids = {node["node_id"] for node in graph["nodes"]}
    assert len(ids) == len(graph["nodes"])
    length = len(metadata["prompt_tokens"])
    last = max((int(n["layer"]) for n in graph["nodes"] if n["layer"].isdigit()), default=0)
    for node in graph["nodes"]:
        assert set(node) == set(NODE)
        for name, wanted in NODE.items():
            assert isinstance(node[name], wanted), (name, node[name])
        assert node["feature_type"] in TYPES
        assert 0 <= node["ctx_idx"] < length
        assert node["influence"] is None or 0 <= node["influence"] <= 1
        check_node(node, last)
    for link in graph["links"]:
        assert set(link) == {"source", "target", "weight"}
        assert link["source"] in ids and link["target"] in ids
        assert isinstance(link["weight"], float)


def check_node(node: Mapping[str, Any], last: int) -> None:
    """Assert the forms of ids, which the viewers take apart again."""
    layer, number, position = node["node_id"].split("_")
    assert (layer, int(position)) == (node["layer"], node["ctx_idx"])
    kind = node["feature_type"]
    if kind == "embedding":
        assert (node["layer"], node["feature"]) == ("E", node["ctx_idx"])
        assert node["jsNodeId"] == f"E_{number}-{position}"
    elif kind == "logit":
        assert node["feature"] == int(number) and int(layer) == last
        assert float(node["clerp"].split("(p=")[1].split(")")[0]) == round(node["token_prob"], 3)
        assert node["clerp"].split('"')[1]
        assert node["jsNodeId"] == f"L_{number}-{position}"
    elif kind == "mlp reconstruction error":
        assert node["feature"] == int(number) < 0
        assert node["jsNodeId"] == f"{layer}_{number}-{position}"
    else:  # Cantor's pairing undone, as the viewer undoes it
        w = int(((8 * node["feature"] + 1) ** 0.5 - 1) // 2)
        index = node["feature"] - (w * w + w) // 2
        assert (w - index, index) == (int(layer), int(number))
        assert node["jsNodeId"] == f"{layer}_{number}-0"
