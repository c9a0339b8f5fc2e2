"""A graph held against the model: its strongest features are taken away, and what changes is read.

Every check removes ``f d`` of one feature at one position where the feature writes, in the real
model with everything live, and compares with what the graph says. An edge of a transcoder graph is
a direct effect, so for it alone the MLPs in between keep their outputs; its other checks, and all
those of a residual graph, hold nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.features.dictionary import SparseDictionary
from layerscope.features.library import DictionarySet
from layerscope.features.pathways.graph_base import AttributionGraph
from layerscope.models import Add, Edit, LanguageModel, Replace, Site
from layerscope.models.prompts import PromptsLike

CHECK_SCHEMA: Mapping[str, pl.DataType] = {
    "kind": pl.String(),
    "source": pl.Int64(),
    "target": pl.Int64(),
    "predicted": pl.Float64(),
    "measured": pl.Float64(),
    "random": pl.Float64(),
}


@dataclass(frozen=True, eq=False)
class _Read:
    """A target: the site and position that it reads, and along what."""

    node: int
    site: Site
    position: int
    direction: Float[Tensor, " d_model"]


@torch.no_grad()
def check_graph(
    model: LanguageModel,
    prompt: PromptsLike,
    dictionaries: DictionarySet,
    graph: AttributionGraph,
    *,
    features: int = 24,
    seed: int = 0,
) -> pl.DataFrame:
    """Take away a graph's features of most influence, one by one, and measure their targets.

    Args:
        model: the model. prompt: as the graph was made of. dictionaries: likewise.
        graph: of `attribution_graph`.
        features: how many are taken away; each costs three forward passes at most.
        seed: of the random directions.

    Returns:
        One row per drawn edge of those features ("edge") and one per feature for all its paths to
        the first logit ("logit"): the change that the graph predicts, the change that was measured,
        and the largest change that a random direction of equal length makes there. Targets are as
        in the graph's edges.
    """
    if features < 1:
        return pl.DataFrame(schema=CHECK_SCHEMA)
    names = {row["node"]: row for row in graph.nodes.iter_rows(named=True)}
    outgoing: dict[int, list[tuple[int, float]]] = {}
    for source, target, weight in graph.edges.iter_rows():
        outgoing.setdefault(source, []).append((target, weight))
    ranked = graph.nodes.filter(kind="feature").sort("influence", "node", descending=[True, False])[
        "node"
    ]
    chosen = [node for node in ranked.to_list() if node in outgoing][:features]
    reads = {
        node: _read(model, dictionaries, names[node])
        for node in {target for node in chosen for target, _ in outgoing[node]} | {0}
    }
    sites = {read.site for read in reads.values()}
    transcoders = graph.summary["basis"] == "transcoders"
    held = [Site("mlp_out", layer) for layer in range(model.n_layers)] if transcoders else []
    batch = model.tokenize(prompt)
    clean = model.run(batch, capture=[*sites, *held], logits=None).activations
    tester = _Tester(model, batch, clean, reads)
    rows: list[tuple[Any, ...]] = []
    for node in chosen:
        feature, targets = names[node], [target for target, _ in outgoing[node]]
        writes = list(_writes(dictionaries[feature["layer"]], feature))
        noise = _noise(writes, seed + node)
        live = tester.changes(writes, [], [*targets, 0])
        lower = [site for site in held if site.layer is not None and site.layer > feature["layer"]]
        direct = tester.changes(writes, lower, targets) if held else live
        random = tester.changes(noise, lower, targets)
        rows += [
            ("edge", node, target, -weight, direct[target], abs(random[target]))
            for target, weight in outgoing[node]
        ]
        if feature["effect"] is not None:
            null = tester.changes(noise, [], [0]) if held or 0 not in random else random
            rows.append(("logit", node, 0, -feature["effect"], live[0], abs(null[0])))
    return pl.DataFrame(rows, schema=CHECK_SCHEMA, orient="row")


def agreement_of(checks: pl.DataFrame) -> dict[str, dict[str, float | int | None]]:
    """Return for edges and logits: how many, signs that agree, correlation, slope, and beyond null.

    The slope is that of measured on predicted through zero; 1 is a perfect graph.
    """
    found: dict[str, dict[str, float | int | None]] = {}
    for kind in ("edge", "logit"):
        part = checks.filter(kind=kind)
        predicted, measured = part["predicted"].to_numpy(), part["measured"].to_numpy()
        squares = float((predicted * predicted).sum())
        beyond = (part["measured"].abs() > part["random"]).to_numpy()
        whole = float((measured * measured).sum())
        found[kind] = {
            "n": part.height,
            "sign_agreement": float((predicted * measured > 0).mean()) if part.height else None,
            "correlation": float((predicted * measured).sum()) / (squares * whole) ** 0.5
            if squares * whole > 0
            else None,
            "slope": float((predicted * measured).sum()) / squares if squares else None,
            "beyond_random": float(beyond.mean()) if part.height else None,
        }
    return found


class _Tester:
    """Runs the prompt with something added, and reads what targets become."""

    def __init__(
        self,
        model: LanguageModel,
        batch: PromptsLike,
        clean: Mapping[Site, Tensor],
        reads: Mapping[int, _Read],
    ) -> None:
        self.model, self.batch, self.clean, self.reads = model, batch, clean, reads

    def before(self, read: _Read) -> Tensor:
        """Return what a target reads in the clean run."""
        return self.clean[read.site][0, read.position].cpu().double()

    def changes(
        self,
        writes: Sequence[tuple[Site, int, Tensor]],
        held: Sequence[Site],
        targets: Iterable[int],
    ) -> dict[int, float]:
        """Return the change of every target when `writes` are taken away."""
        wanted = [self.reads[target] for target in dict.fromkeys(targets)]
        written = {site for site, _, _ in writes}
        edits: list[Edit] = [
            Replace(site, self.clean[site]) for site in held if site not in written
        ]
        for site, position, change in writes:
            if site in held:  # a cross-layer feature writes onto what is held
                edits.append(Replace(site, self.clean[site]))
            edits.append(Add(site, -change.to(self.model.dtype), positions=position))
        found = self.model.run(
            self.batch, capture=list({read.site for read in wanted}), edits=edits, logits=None
        )
        return {
            read.node: float(
                (found[read.site][0, read.position].cpu().double() - self.before(read))
                @ read.direction
            )
            for read in wanted
        }


def _read(model: LanguageModel, dictionaries: DictionarySet, node: Mapping[str, Any]) -> _Read:
    if node["kind"] == "logit":
        weight = model.unembedding.weight.detach()
        weight = weight.cpu() if weight.device.type == "mps" else weight  # which has no float64
        mean = weight.mean(0, dtype=torch.float64).cpu()
        direction = weight[node["feature_id"]].cpu().double() - mean
        return _Read(node["node"], Site("final_norm"), node["position"], direction)
    dictionary = dictionaries[node["layer"]]
    direction = dictionary.read_rows([node["feature_id"]])[0].cpu().double()
    return _Read(node["node"], dictionary.reads, node["position"], direction)


def _writes(
    dictionary: SparseDictionary, node: Mapping[str, Any]
) -> Iterable[tuple[Site, int, Tensor]]:
    for to, site in enumerate(dictionary.writes):
        direction = dictionary.write_directions([node["feature_id"]], to=to)[0].cpu()
        yield site, node["position"], node["activation"] * direction


def _noise(writes: Sequence[tuple[Site, int, Tensor]], seed: int) -> list[tuple[Site, int, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Site, int, Tensor]] = []
    for site, position, change in writes:
        drawn = torch.randn(change.shape, generator=generator).to(change)
        found.append((site, position, drawn * change.norm() / drawn.norm()))
    return found
