"""What every attribution graph starts from and ends with: one run, the logits, the tables.

Blocks run where the model is; sums are taken in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import PromptError
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.library import DictionarySet
from layerscope.features.pathways.pruning import GraphOptions, Key, Node, add, prune, tables
from layerscope.features.pathways.pullback import Pullback
from layerscope.features.pathways.state import PromptState
from layerscope.features.spaces import FeatureSpace
from layerscope.interventions.stream import FrozenNorm, freeze_norm
from layerscope.models import LanguageModel, TokenBatch
from layerscope.models.prompts import PromptsLike
from layerscope.products import choose
from layerscope.products import products as matrix_products

_PROMOTED = 4


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Nodes and edges, and how far sums over sources are from the nodes themselves.

    Attributes:
        nodes: one row per node: kind "logit", "feature", "error", "mlp" or "token"; `influence` on
            the logits and its cumulative share, largest first; `effect`: what the first logit owes
            to it by all paths, as the graph says; `residual`: |sum of sources - value| over the
            largest source, of expanded nodes; `promotes`: tokens that a feature raises most by
            itself.
        edges: attribution of a source to a target, in units of the target (a logit before scale and
            softcap, or a pre-activation).
        summary: completeness, where influence ends, what was dropped, options, tokens.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    summary: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Active:
    """Active features of one layer: entries, and what each writes at every layer it reaches."""

    layer: int
    positions: Tensor
    ids: Tensor
    values: Tensor
    reads: Tensor
    biases: Tensor
    writes: dict[int, Tensor]  # layer -> [entry, d_model]


class GraphBase:
    """One prompt, run once, and the nodes that are explained.

    Args:
        model: the model the dictionaries were made for.
        prompt: one prompt.
        dictionaries: what its features are.
        options: how large the graph is.

    Raises:
        PromptError: there is not exactly one prompt.
        DictionaryError: the dictionaries belong to another model.
    """

    basis = ""

    def __init__(
        self,
        model: LanguageModel,
        prompt: PromptsLike,
        dictionaries: DictionarySet,
        options: GraphOptions,
    ) -> None:
        for each in dictionaries:
            each.require_model(model)
        self.model, self.options = model, options
        self.products = choose(options.products, device=model.device)
        self.batch = model.tokenize(prompt)
        if len(self.batch) != 1:
            raise PromptError(f"a graph explains one prompt, not {len(self.batch)}")
        self.n = self.batch.lengths[0]
        self.strings = model.token_strings()
        self.tokens = tuple(self.strings[token] for token in self.batch.ids[0].tolist())
        layers = range(model.n_layers)
        rows = ["resid_pre.0", *(f"resid_post.{layer}" for layer in layers)]
        sites = [*rows, *(f"{kind}.{layer}" for layer in layers for kind in ("mlp_in", "mlp_out"))]
        with torch.no_grad():
            run = model.run(self.batch, capture=[*sites, "final_norm"], logits="last")
        self.residuals = torch.cat([run[site] for site in rows])
        self.stream = self.residuals.cpu()
        self.mlp_in = [run[f"mlp_in.{layer}"][0].cpu() for layer in layers]
        self.mlp_out = [run[f"mlp_out.{layer}"][0].cpu().double() for layer in layers]
        self.final = run["final_norm"][0]
        assert run.logits is not None
        self.probabilities = run.logits[0, -1].float().softmax(-1).cpu()
        weight = model.unembedding.weight.detach()
        self.head = weight.cpu() if weight.device.type == "mps" else weight  # which has no float64
        self.linear = Pullback(self._state(), variant="linear", n_positions=self.n)
        self.norms: dict[int, FrozenNorm] = {}

    def build(self) -> AttributionGraph:
        """Sweep once from the top down, then prune."""
        with torch.no_grad(), matrix_products(self.products):
            nodes = self.sweep()
        return self._finish(nodes)

    def sweep(self) -> list[Node]:
        """Return all expanded nodes, from the top down, with their sources."""
        raise NotImplementedError

    @property
    def active(self) -> Mapping[int, Active]:
        """What is active, by layer."""
        raise NotImplementedError

    @property
    def effects(self) -> dict[Key, float] | None:
        """What the first logit owes to features; None where products along paths say it."""
        return None

    def norm(self, layer: int) -> FrozenNorm:
        """Return the norm before an MLP, held."""
        if layer not in self.norms:
            self.norms[layer] = _wide(self.linear.held.mlp_norm(layer))
        return self.norms[layer]

    def through(
        self, layer: int, cotangents: Float[Tensor, "node pos d_model"]
    ) -> Float[Tensor, "node pos d_model"]:
        """Pull cotangents back through a block's attention and the stream beside it."""
        held = cotangents.to(self.residuals.dtype).to(self.residuals.device)
        return self.linear.through(layer, held).cpu().double()

    def encode(self, dictionary: SparseDictionary, values: Tensor) -> Active:
        """Return what is active of a dictionary; nothing at positions it was not trained on."""
        dense = dictionary.encode(values).detach().cpu()
        dense[: int(dictionary.facts.get("skip") or 0)] = 0.0
        positions, ids = dense.nonzero(as_tuple=True)
        writes: dict[int, Tensor] = {}
        for to, site in enumerate(dictionary.writes):
            assert site.layer is not None
            writes[site.layer] = dictionary.write_directions(ids, to=to).cpu().double()
        return Active(
            dictionary.layer,
            positions,
            ids,
            dense[positions, ids].double(),
            dictionary.read_rows(ids).cpu().double(),
            dictionary.read_bias(ids).cpu().double(),
            writes,
        )

    def written(self, active: Active, layer: int) -> Float[Tensor, "pos d_model"]:
        """Return what active features write at a layer together."""
        total = torch.zeros(self.n, self.model.d_model, dtype=torch.float64)
        return total.index_add_(0, active.positions, active.values[:, None] * active.writes[layer])

    def logits(self) -> list[Node]:
        """Return the most likely next tokens, each held against the mean over the vocabulary."""
        probs, ids = self.probabilities.topk(min(self.options.logits, self.model.d_vocab))
        enough = int((probs.cumsum(0) < self.options.logit_mass).sum()) + 1
        norm = self._final_norm()
        mean = self.head.mean(0, dtype=torch.float64).cpu()
        final = self.final[-1].cpu().double()
        nodes: list[Node] = []
        for token, probability in list(zip(ids.tolist(), probs.tolist(), strict=True))[:enough]:
            direction = self.head[token].cpu().double() - mean
            nodes.append(
                Node(
                    kind="logit",
                    layer=self.model.n_layers,
                    feature=token,
                    position=self.n - 1,
                    token=self.strings[token],
                    value=float(direction @ final),
                    activation=probability,
                    influence=probability,
                    constant=float(direction @ norm.bias),
                    cotangent=norm.pull(direction[None])[0],
                )
            )
        return nodes

    def join(
        self, cotangents: Float[Tensor, "node pos d_model"] | None, nodes: Sequence[Node]
    ) -> Float[Tensor, "more pos d_model"]:
        """Add the cotangents of nodes, each at its own position."""
        new = torch.zeros(len(nodes), self.n, self.model.d_model, dtype=torch.float64)
        for place, node in enumerate(nodes):
            new[place, node.position] = node.cotangent
            node.sums += node.constant
        return new if cotangents is None else torch.cat([cotangents, new])

    def onto(
        self, cotangents: Float[Tensor, "node pos d_model"], source: Active, layer: int
    ) -> Float[Tensor, "node entry"]:
        """Return what a source's active features give by what they write at a layer."""
        counts = torch.bincount(source.positions, minlength=self.n).tolist()
        rows = source.writes[layer].split(counts)  # entries are in the order of positions
        return torch.cat([cotangents[:, at] @ here.T for at, here in enumerate(rows)], dim=1)

    def attention_bias(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """Return what a block's frozen attention writes whatever it reads: biases."""
        zero = torch.zeros_like(self.residuals[layer : layer + 1])
        written = self.linear.block(layer, zero).detach()[0].cpu().double()
        return written - self.mlp_out[layer]

    def add_tokens(self, nodes: Sequence[Node], cotangents: Tensor) -> None:
        """Add what the embeddings give to nodes whose cotangents are at row 0."""
        for place, node in enumerate(nodes):
            parts = (cotangents[place] * self.stream[0].double()).sum(-1)
            for position, value in enumerate(parts.tolist()):
                node.edges["token", -1, -1, position] = value
            add([node], parts.sum()[None], parts.abs().max()[None], parts.abs().sum()[None])

    def strongest(self, nodes: Sequence[Node], found: Tensor, share: int) -> list[int]:
        """Return the sources of most influence, of attributions [node, source]."""
        size = torch.tensor([max(node.inbound, 1e-30) for node in nodes]).double()
        weight = torch.tensor([node.influence for node in nodes]).double()
        self.influence = (found.abs() / size[:, None] * weight[:, None]).sum(0)
        return torch.argsort(self.influence, descending=True, stable=True)[:share].tolist()

    def _final_norm(self) -> FrozenNorm:
        _, norm = self.model.norm_at(self.model.n_layers, "final")
        last, normed = self.residuals[-1, -1:], self.final[-1:]
        return _wide(freeze_norm(norm, last, normed, self.model.dtype, "the final norm"))

    def _promoted(self, keys: Sequence[Key]) -> dict[Key, str]:
        """Return the tokens whose logits features raise most by themselves, by the last norm."""
        features = [key for key in keys if key[0] == "feature"]
        if not features:
            return {}
        directions: list[Tensor] = []
        for _, layer, feature, position in features:
            active = self.active[layer]
            entry = int(((active.ids == feature) & (active.positions == position)).nonzero()[0])
            written = torch.stack([rows[entry] for rows in active.writes.values()])
            directions.append(written.sum(0))
        found = torch.stack(directions) * self._final_norm().gain
        raised = found.to(self.head.dtype).to(self.head.device) @ self.head.T
        best = raised.topk(min(_PROMOTED, raised.shape[1])).indices.tolist()
        return {
            key: " ".join(repr(self.strings[token]) for token in tokens)
            for key, tokens in zip(features, best, strict=True)
        }

    def _finish(self, nodes: Sequence[Node]) -> AttributionGraph:
        residuals = [
            abs(node.sums - node.value) / max(node.largest, abs(node.value), 1e-30)
            for node in nodes
        ]
        pruned = prune(nodes, self.options, self.effects)
        promoted = self._promoted(list(pruned.kept))
        table, edges = tables(nodes, residuals, pruned, self.tokens, promoted)
        summary = {
            "basis": self.basis,
            "prompt_tokens": list(self.tokens),
            "prompt_ids": self.batch.ids[0].tolist(),
            "expanded_nodes": len(nodes),
            "active_features": sum(len(each.ids) for each in self.active.values()),
            "largest_residual": max(residuals),
            "influence_ends": pruned.ends,
            "replacement_score": pruned.replacement_score,
            "drawn_share_of_influence": _drawn(nodes),
            "products": self.products.to_dict(),
            "options": {name: getattr(self.options, name) for name in _OPTION_NAMES},
            "unit": "logit before scale and softcap, less the mean over the vocabulary",
        }
        return AttributionGraph(table, edges, summary)

    def _state(self) -> PromptState:
        """Return what a pullback needs of a prompt."""
        real = torch.ones_like(self.batch.ids, dtype=torch.bool)
        return PromptState(
            model=self.model,
            prompt_id="0",
            batch=TokenBatch(self.batch.ids, real, (self.n,)),
            tokens=self.tokens,
            residuals=self.residuals,
            cache=None,
            layers={},
            targets=(),
            space=FeatureSpace("graph", ()),
            bytes_read=0,
        )


def along(
    cotangents: Float[Tensor, "node pos d_model"], rows: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "node pos"]:
    """Return the product of every cotangent with the row of its position."""
    return torch.einsum("npd,pd->np", cotangents, rows)


def _wide(norm: FrozenNorm) -> FrozenNorm:
    """Return a norm in float64 on the CPU."""
    gain, bias, scale = (part.cpu().double() for part in (norm.gain, norm.bias, norm.scale))
    return FrozenNorm(gain, bias, scale, norm.centred)


def _drawn(nodes: Sequence[Node]) -> float:
    """Return the share of what flows into nodes, weighed by their influence, that edges carry."""
    whole = drawn = 0.0
    for node in nodes:
        whole += node.influence
        if node.inbound:
            carried = sum(abs(weight) for weight in node.edges.values())
            drawn += node.influence * carried / node.inbound
    return drawn / whole if whole else 0.0


_OPTION_NAMES = ("max_features", "logits", "logit_mass", "node_share", "edge_share")
