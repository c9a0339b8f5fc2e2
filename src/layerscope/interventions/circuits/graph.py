"""A circuit: edges of a model that are kept, as data and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from layerscope.errors import ConfigError
from layerscope.interventions.attribution.edges import Edge, EdgeScores, Receiver
from layerscope.interventions.stream import Writer

Ranking: TypeAlias = Literal["signed", "magnitude"]


@dataclass(frozen=True)
class Circuit:
    """Edges kept, and the score of each (mean over pairs, in units of the metric).

    Attributes:
        edges: the strongest first.
        scores: of the edges.
        n_all: edges of the whole model.
        ranking: how they were chosen.
        group: query heads that share a key-value head.
    """

    edges: tuple[Edge, ...]
    scores: tuple[float, ...]
    n_all: int
    ranking: Ranking
    group: int = 1

    @property
    def share(self) -> float:
        """Share of all edges."""
        return len(self.edges) / self.n_all

    def live(self) -> Circuit:
        """Return the circuit without edges that lead nowhere: every part is on a path to the end.

        A part counts as fed where it is the embedding or reads from a part that is.
        """
        kept = list(zip(self.edges, self.scores, strict=True))
        while True:
            writes = {node for (writer, _), _ in kept for node in self.nodes_of(writer)}
            reads = {node for (_, receiver), _ in kept for node in self.nodes_of(receiver)}
            alive = [
                (edge, score)
                for edge, score in kept
                if (edge[0].kind == "embed" or reads & set(self.nodes_of(edge[0])))
                and (edge[1].kind == "logits" or writes & set(self.nodes_of(edge[1])))
            ]
            if len(alive) == len(kept):
                break
            kept = alive
        edges, scores = tuple(edge for edge, _ in kept), tuple(score for _, score in kept)
        return replace(self, edges=edges, scores=scores)

    def nodes_of(self, part: Writer | Receiver) -> tuple[str, ...]:
        """Return the nodes that a writer or receiver is part of: heads that share keys are all."""
        if part.kind not in ("q", "k", "v"):
            return (str(part),)
        share = self.group if part.kind != "q" else 1
        heads = range(part.head * share, (part.head + 1) * share)
        return tuple(f"attn.{part.layer}.head.{head}" for head in heads)

    def to_dict(self) -> dict[str, Any]:
        """Return edges, nodes with their place in a drawing, and the definition, ready for JSON."""
        names: dict[str, tuple[int, str]] = {}
        for writer, receiver in self.edges:
            for part in (writer, receiver):
                names |= dict.fromkeys(self.nodes_of(part), (part.layer, part.kind))
        return {
            "edges": [
                {
                    "source": str(writer),
                    "target": str(receiver),
                    "from": str(writer),
                    "to": list(self.nodes_of(receiver)),
                    "score": score,
                }
                for (writer, receiver), score in zip(self.edges, self.scores, strict=True)
            ],
            "nodes": _places(names),
            "n_edges": len(self.edges),
            "n_all": self.n_all,
            "ranking": self.ranking,
        }


def keep_edges(
    scores: EdgeScores, count: int, *, ranking: Ranking = "magnitude", live: bool = True
) -> Circuit:
    """Keep the `count` strongest edges.

    Args:
        scores: of all edges. Attention biases are no choice: they always stay.
        count: how many.
        ranking: "magnitude" by the size of the mean score; "signed" those first whose exchange
            moves the metric most towards the donor's (what the behaviour needs).
        live: drop edges that are on no path from the embedding to the logits.

    Raises:
        ConfigError: there are not so many edges, or the ranking is unknown.
    """
    edges, values = choices(scores, ranking)
    if not 0 <= count <= len(edges):
        raise ConfigError(f"cannot keep {count} of {len(edges)} edges")
    order = torch.argsort(values, descending=True, stable=True)[:count].tolist()
    kept = tuple(edges[index] for index in order)
    found = tuple(float(scores[edge].double().mean()) for edge in kept)
    model = scores.contrast.model
    group = model.n_heads // model.n_kv_heads
    circuit = Circuit(kept, found, len(edges), ranking, group)
    return circuit.live() if live else circuit


def choices(scores: EdgeScores, ranking: Ranking) -> tuple[list[Edge], torch.Tensor]:
    """Return the edges that a circuit is chosen from, and what they are ranked by."""
    edges = [edge for edge in scores.edges() if edge[0].kind != "attn_bias"]
    at = {writer: index for index, writer in enumerate(scores.writers)}
    to = {receiver: index for index, receiver in enumerate(scores.receivers)}
    mean = torch.stack([scores.mean[at[writer], to[receiver]] for writer, receiver in edges])
    if ranking == "magnitude":
        return edges, mean.abs()
    if ranking != "signed":
        raise ConfigError(f"ranking is {ranking!r}; use 'signed' or 'magnitude'")
    towards = float(scores.contrast.total.double().mean())
    return edges, mean if towards >= 0 else -mean


def _places(names: dict[str, tuple[int, str]]) -> list[dict[str, Any]]:
    """Return nodes with x (their place in a row) and y (their row, from the embedding up)."""
    rows: dict[float, list[str]] = {}
    for name, (layer, kind) in names.items():
        below = kind not in ("mlp", "logits", "embed")
        rows.setdefault(layer + (0.0 if below else 0.5), []).append(name)
    return [
        {"name": name, "layer": names[name][0], "x": index - (len(row) - 1) / 2, "y": height}
        for height, row in sorted(rows.items())
        for index, name in enumerate(sorted(row))
    ]


def edge_mask(scores: EdgeScores, kept: Sequence[Edge]) -> torch.Tensor:
    """Return [writer, receiver], True where an edge is kept; those of attention biases always."""
    mask = torch.zeros_like(scores.exists)
    for index, writer in enumerate(scores.writers):
        if writer.kind == "attn_bias":
            mask[index] = scores.exists[index]
    at = {writer: index for index, writer in enumerate(scores.writers)}
    to = {receiver: index for index, receiver in enumerate(scores.receivers)}
    for writer, receiver in kept:
        mask[at[writer], to[receiver]] = True
    return mask
