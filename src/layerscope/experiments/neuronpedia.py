"""The JSON that circuit-tracer writes and that its viewer and Neuronpedia's read: one writer.

Four parts: ``metadata``, ``qParams`` (an empty saved view), ``nodes`` and ``links``. What viewers
take for granted, beyond types: ids are unique, features are numbered by Cantor's pairing of layer
and index (schema version 1), a logit's label carries ``(p=...)``, the layer of a token is "E" and
that of a logit one above the last block's successor, and ``influence`` is cumulative, so that a
threshold keeps the strongest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import layerscope
from layerscope.errors import OutputError

Kind = Literal["feature", "error", "mlp", "token", "logit"]
_TYPES: Mapping[str, str] = {
    "feature": "cross layer transcoder",  # the viewers' word for any feature
    "error": "mlp reconstruction error",
    "mlp": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}
_NOTHING_SAVED: Mapping[str, Any] = {
    "pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": "",
}  # fmt: skip
_ERROR_SLOTS = {"error": -1, "mlp": -2}  # no feature has these numbers


@dataclass(frozen=True, kw_only=True)
class ViewerNode:
    """A node as viewers know it.

    Attributes:
        kind: what it is; "mlp" is what an MLP writes beyond its tangent, shown as an error.
        layer: block of a feature or error; of no meaning otherwise.
        position: of the prompt, BOS counted.
        index: of a feature, or the token id of a token or logit.
        label: what is written on a feature; the text of a logit's token.
        influence: cumulative share of influence, strongest first, 0 to 1; None where not known.
        activation: of a feature.
        probability: of a logit.
    """

    kind: Kind
    layer: int
    position: int
    index: int = 0
    label: str = ""
    influence: float | None = None
    activation: float | None = None
    probability: float = 0.0

    def id(self, n_layers: int) -> str:
        """Return its name, of which no two nodes of a graph have the same."""
        if self.kind == "token":
            return f"E_{self.index}_{self.position}"
        if self.kind == "logit":
            return f"{n_layers + 1}_{self.index}_{self.position}"
        return f"{self.layer}_{_ERROR_SLOTS.get(self.kind, self.index)}_{self.position}"


def viewer_file(
    nodes: Sequence[ViewerNode],
    links: Iterable[tuple[int, int, float]],
    *,
    name: str,
    scan: str,
    n_layers: int,
    prompt: str,
    tokens: Sequence[str],
    description: str = "",
    node_share: float | None = None,
    settings: Mapping[str, Any] | None = None,
    pruning: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return a graph as JSON values.

    Args:
        nodes: its nodes; the first logit is the one that is explained.
        links: (source, target, weight), nodes by their place in `nodes`.
        name: of the graph; its slug is made of it.
        scan: name of the model. n_layers: of the model.
        prompt: its text. tokens: its tokens as text, BOS included.
        description: shown beside the graph.
        node_share: the threshold that viewers begin with; None for none.
        settings: how the graph was made. pruning: and what of it was kept.

    Raises:
        OutputError: two nodes have one name, or a position is not of the prompt.
    """
    names = _names(nodes, n_layers, len(tokens))
    first = next((place for place, node in enumerate(nodes) if node.kind == "logit"), None)
    metadata: dict[str, Any] = {
        "slug": slug(f"{scan}-{name}"),
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": list(tokens),
        "prompt": prompt,
        "schema_version": 1,
        "info": {
            "description": description,
            "generator": {"name": "layerscope", "version": layerscope.__version__},
        },
        "generation_settings": dict(settings or {}),
        "pruning_settings": dict(pruning or {}),
    }
    if node_share is not None:  # absent, not null: the schema knows a number only
        metadata["node_threshold"] = node_share
    return {
        "metadata": metadata,
        "qParams": dict(_NOTHING_SAVED),
        "nodes": [
            _node(node, names[place], n_layers, target=place == first)
            for place, node in enumerate(nodes)
        ],
        "links": [
            {"source": names[source], "target": names[target], "weight": weight}
            for source, target, weight in links
        ],
    }


def _names(nodes: Sequence[ViewerNode], n_layers: int, n_tokens: int) -> list[str]:
    names = [node.id(n_layers) for node in nodes]
    if len(set(names)) < len(names):
        double = next(each for each in names if names.count(each) > 1)
        raise OutputError(f"two nodes of the graph are called {double}; give each one once")
    beyond = [node.position for node in nodes if not 0 <= node.position < n_tokens]
    if beyond:
        raise OutputError(f"a node is at position {beyond[0]} of a prompt of {n_tokens} tokens")
    return names


def slug(text: str) -> str:
    """Return a name for files and addresses: small letters, digits and hyphens, at most 60."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-")


def paired(layer: int, feature: int) -> int:
    """Return Cantor's number of a pair, by which viewers tell features apart."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _node(node: ViewerNode, name: str, n_layers: int, *, target: bool) -> dict[str, Any]:
    slot = _ERROR_SLOTS.get(node.kind, node.index)
    layer, number, hovered = {
        "token": ("E", node.position, f"E_{node.index}-{node.position}"),
        "logit": (str(n_layers + 1), node.index, f"L_{node.index}-{node.position}"),
        "feature": (str(node.layer), paired(node.layer, max(slot, 0)), f"{node.layer}_{slot}-0"),
    }.get(node.kind, (str(node.layer), slot, f"{node.layer}_{slot}-{node.position}"))
    label = node.label
    if node.kind == "logit":
        label = f'Output "{node.label}" (p={node.probability:.3f})'
    return {
        "node_id": name,
        "feature": number,
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": _TYPES[node.kind],
        "token_prob": node.probability,
        "is_target_logit": target,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": hovered,
        "clerp": label,
        "influence": node.influence,
        "activation": node.activation,
    }
