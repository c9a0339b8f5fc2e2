"""The attribution graph of one prompt: transcoder features, errors and tokens behind its logits.

MLPs are replaced by their transcoders' features, what these do not explain stays as error nodes,
and attention patterns and norms are held fixed. Every kept node is then an exact sum over its
sources (Ameisen et al., 2025, "Circuit Tracing"), and the graph says by how much that fails.

One sweep from the top of the model down makes it: a layer's features are chosen by their influence
on what was chosen above them, and join the sweep there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import DictionaryError, PromptError
from layerscope.features.library import DictionarySet
from layerscope.features.pathways.pruning import GraphOptions, Node, prune, tables
from layerscope.features.pathways.pullback import Pullback
from layerscope.features.pathways.state import PromptState
from layerscope.features.spaces import FeatureSpace
from layerscope.interventions.stream import FrozenNorm, freeze_norm
from layerscope.models import LanguageModel, Site, TokenBatch
from layerscope.models.prompts import PromptsLike


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Nodes and edges, and how far sums over sources are from the nodes themselves.

    Attributes:
        nodes: one row per node: kind "logit", "feature", "error" or "token"; `influence` on the
            logits; `residual`: |sum of sources - value| over the largest source, of expanded nodes.
        edges: attribution of a source to a target, in units of the target (a logit before scale and
            softcap, or a pre-activation).
        summary: completeness, what was dropped, options, tokens.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    summary: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Active:
    """Active features of one layer: entries, and what each writes at every layer it reaches."""

    layer: int
    positions: Tensor
    ids: Tensor
    values: Tensor
    reads: Tensor
    biases: Tensor
    writes: dict[int, Tensor]  # layer -> [entry, d_model]


def attribution_graph(
    model: LanguageModel,
    prompt: PromptsLike,
    transcoders: DictionarySet,
    options: GraphOptions | None = None,
) -> AttributionGraph:
    """Explain a prompt's next token by transcoder features.

    Args:
        model: the model the transcoders were made for.
        prompt: one prompt.
        transcoders: dictionaries that read ``mlp_in`` and write ``mlp_out``, cross-layer or not.
        options: how large the graph is.

    Raises:
        DictionaryError: the dictionaries are no transcoders of the MLPs, or belong elsewhere.
        CapabilityError: the family's attention or norms cannot be held fixed.
    """
    return _Builder(model, prompt, transcoders, options or GraphOptions()).build()


class _Builder:
    def __init__(
        self,
        model: LanguageModel,
        prompt: PromptsLike,
        transcoders: DictionarySet,
        options: GraphOptions,
    ) -> None:
        for each in transcoders:
            each.require_model(model)
            if each.reads.kind != "mlp_in" or {site.kind for site in each.writes} != {"mlp_out"}:
                raise DictionaryError(
                    f"an attribution graph replaces MLPs, but this dictionary reads {each.reads} "
                    f"and writes {each.writes[0]}; open transcoders from mlp_in to mlp_out"
                )
        self.model, self.options = model, options
        self.batch = model.tokenize(prompt)
        if len(self.batch) != 1:
            raise PromptError(f"a graph explains one prompt, not {len(self.batch)}")
        self.n = self.batch.lengths[0]
        strings = model.token_strings()
        self.tokens = tuple(strings[token] for token in self.batch.ids[0].tolist())
        self.strings = strings
        layers = range(model.n_layers)
        sites = ["resid_pre.0"]
        for layer in layers:
            sites += [f"mlp_in.{layer}", f"mlp_out.{layer}", f"resid_post.{layer}"]
        with torch.no_grad():
            run = model.run(self.batch, capture=[*sites, "final_norm"], logits="last")
        rows = ["resid_pre.0", *(f"resid_post.{layer}" for layer in layers)]
        self.residuals = torch.cat([run[site] for site in rows])
        self.mlp_in = [run[f"mlp_in.{layer}"][0] for layer in layers]
        self.errors = [run[f"mlp_out.{layer}"][0].double() for layer in layers]
        self.final = run["final_norm"][0]
        assert run.logits is not None
        self.probabilities = run.logits[0, -1].float().softmax(-1)
        self.biases: dict[int, Tensor] = defaultdict(lambda: torch.zeros(model.d_model).double())
        self.pullback = Pullback(_state(self), variant="linear", n_positions=self.n)
        self.active = self._encode(transcoders)
        self.norms: dict[int, FrozenNorm] = {}

    def build(self) -> AttributionGraph:
        """Sweep once, then prune."""
        nodes = self._logits()
        cotangents = self._join(torch.zeros(0, self.n, self.model.d_model).double(), nodes)
        effects: dict[int, Tensor] = {}
        left = self.options.max_features
        with torch.no_grad():
            for row in range(self.model.n_layers, 0, -1):
                layer = row - 1
                self._collect(layer, nodes, cotangents, effects)
                chosen = self._choose(layer, nodes, effects, left)
                left -= len(chosen)
                parallel = self.model.backend.why_not(Site("resid_mid", layer)) is not None
                if not parallel:  # with the MLP held, the stream before it is as good as behind it
                    cotangents = self._join(cotangents, chosen)
                    nodes = [*nodes, *chosen]
                _add(nodes, (cotangents * self._constant(layer)).sum((1, 2)))
                cotangents = self.pullback.through(layer, cotangents)
                if parallel:  # its MLP reads what its attention reads
                    cotangents = self._join(cotangents, chosen)
                    nodes = [*nodes, *chosen]
            for place, node in enumerate(nodes):
                parts = (cotangents[place] * self.residuals[0].double()).sum(-1)
                for position, value in enumerate(parts.tolist()):
                    node.edges["token", -1, -1, position] = value
                _add([node], parts.sum()[None], parts.abs().max()[None], parts.abs().sum()[None])
        return self._finish(nodes)

    def _encode(self, transcoders: DictionarySet) -> dict[int, _Active]:
        """Find what is active, and take what it explains from the errors."""
        found: dict[int, _Active] = {}
        for dictionary in transcoders:
            layer = dictionary.layer
            dense = dictionary.encode(self.mlp_in[layer]).detach()
            positions, ids = dense.nonzero(as_tuple=True)
            writes: dict[int, Tensor] = {}
            for to, site in enumerate(dictionary.writes):
                assert site.layer is not None
                rows = dictionary.write_directions(ids, to=to).double()
                writes[site.layer] = rows
                written = torch.zeros_like(self.errors[site.layer])
                written.index_add_(0, positions, dense[positions, ids, None].double() * rows)
                self.errors[site.layer] -= written
            bias = dictionary.decoder_bias.double()
            self.errors[layer] -= bias
            self.biases[layer] = self.biases[layer] + bias
            found[layer] = _Active(
                layer,
                positions,
                ids,
                dense[positions, ids].double(),
                dictionary.read_rows(ids).double(),
                dictionary.read_bias(ids).double(),
                writes,
            )
            dictionary.release()
        return found

    def _logits(self) -> list[Node]:
        """The most likely next tokens, each held against the mean over the vocabulary."""
        head = self.model.unembedding
        probs, ids = self.probabilities.topk(min(self.options.logits, self.model.d_vocab))
        enough = int((probs.cumsum(0) < self.options.logit_mass).sum()) + 1
        _, final_norm = self.model.norm_at(self.model.n_layers, "final")
        norm = freeze_norm(
            final_norm,
            self.residuals[-1, -1:],
            self.final[-1:],
            self.model.dtype,
            "the final norm",
        )
        weight = head.weight.detach()
        mean = weight.double().mean(0)
        nodes: list[Node] = []
        for token, probability in list(zip(ids.tolist(), probs.tolist(), strict=True))[:enough]:
            direction = weight[token].double() - mean
            nodes.append(
                Node(
                    kind="logit",
                    layer=self.model.n_layers,
                    feature=token,
                    position=self.n - 1,
                    token=self.strings[token],
                    value=float(direction @ self.final[-1].double()),
                    activation=probability,
                    influence=probability,
                    constant=float(direction @ norm.bias),
                    cotangent=_pulled(norm, direction, 0),
                )
            )
        return nodes

    def _join(self, cotangents: Tensor, nodes: Sequence[Node]) -> Tensor:
        new = torch.zeros(len(nodes), self.n, self.model.d_model).double()
        for place, node in enumerate(nodes):
            new[place, node.position] = node.cotangent
            node.sums += node.constant
        return torch.cat([cotangents, new])

    def _collect(
        self, layer: int, nodes: Sequence[Node], cotangents: Tensor, effects: dict[int, Tensor]
    ) -> None:
        """Add what is written at a layer: features, errors, biases."""
        bias = (cotangents @ self.biases[layer]).sum(-1)
        _add(nodes, bias)
        errors = (cotangents * self.errors[layer]).sum(-1)
        for place, node in enumerate(nodes):
            for position, value in enumerate(errors[place].tolist()):
                if value:
                    node.edges["error", layer, -1, position] = value
        _add(nodes, errors.sum(1), errors.abs().amax(1), errors.abs().sum(1))
        for source in self.active.values():
            rows = source.writes.get(layer)
            if rows is None or not len(rows):
                continue
            found = torch.stack([(c[source.positions] * rows).sum(-1) for c in cotangents])
            found = found * source.values
            _add(nodes, found.sum(1), found.abs().amax(1), found.abs().sum(1))
            held = effects.get(source.layer)
            if held is not None:
                found[: len(held)] += held
            effects[source.layer] = found

    def _choose(
        self, layer: int, nodes: Sequence[Node], effects: dict[int, Tensor], left: int
    ) -> list[Node]:
        """Take a layer's features of most influence; all that they do above is known by now."""
        source, found = self.active.get(layer), effects.pop(layer, None)
        if source is None or found is None or not found.numel():
            return []
        size = torch.tensor([max(node.inbound, 1e-30) for node in nodes]).double()
        weight = torch.tensor([node.influence for node in nodes]).double()
        influence = (found.abs() / size[:, None] * weight[:, None]).sum(0)
        # Layers below must have their turn: a share of what is left, at least one.
        share = max(1, -(-left // (layer + 1))) if left > 0 else 0
        order = torch.argsort(influence, descending=True, stable=True)[:share].tolist()
        norm = self.norms.setdefault(layer, self.pullback.mlp_norm(layer)) if order else None
        chosen: list[Node] = []
        for entry in order:
            assert norm is not None
            position, feature = int(source.positions[entry]), int(source.ids[entry])
            read = source.reads[entry]
            here = self.mlp_in[layer][position].double()
            for place, node in enumerate(nodes):
                node.edges["feature", layer, feature, position] = float(found[place, entry])
            chosen.append(
                Node(
                    kind="feature",
                    layer=layer,
                    feature=feature,
                    position=position,
                    token=self.tokens[position],
                    value=float(read @ here + source.biases[entry]),
                    activation=float(source.values[entry]),
                    influence=float(influence[entry]),
                    constant=float(read @ norm.bias + source.biases[entry]),
                    cotangent=_pulled(norm, read, position),
                )
            )
        return chosen

    def _constant(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """Return what a block's frozen attention writes whatever it reads: biases."""
        zero = torch.zeros_like(self.residuals[layer : layer + 1])
        written = self.pullback.block(layer, zero).detach()[0].double()
        return written - self.pullback.mlp_outputs(layer).detach().double()

    def _finish(self, nodes: Sequence[Node]) -> AttributionGraph:
        residuals = [
            abs(node.sums - node.value) / max(node.largest, abs(node.value), 1e-30)
            for node in nodes
        ]
        kept = prune(nodes, self.options)
        table, edges = tables(nodes, residuals, kept, self.tokens)
        drawn = sum(abs(weight) for _, _, weight in edges.iter_rows())
        whole = sum(node.inbound for node in nodes)
        summary = {
            "prompt_tokens": list(self.tokens),
            "expanded_nodes": len(nodes),
            "active_features": sum(len(each.ids) for each in self.active.values()),
            "largest_residual": max(residuals),
            "drawn_share_of_attribution": drawn / whole if whole else None,
            "options": {name: getattr(self.options, name) for name in _OPTION_NAMES},
            "unit": "logit before scale and softcap, less the mean over the vocabulary",
        }
        return AttributionGraph(table, edges, summary)


_OPTION_NAMES = ("max_features", "logits", "logit_mass", "node_share", "edge_share")


def _state(builder: _Builder) -> PromptState:
    """Return what a pullback needs of a prompt."""
    return PromptState(
        model=builder.model,
        prompt_id="0",
        batch=TokenBatch(
            builder.batch.ids, torch.ones_like(builder.batch.ids, dtype=torch.bool), (builder.n,)
        ),
        tokens=builder.tokens,
        residuals=builder.residuals,
        cache=None,
        layers={},
        targets=(),
        space=FeatureSpace("graph", ()),
        bytes_read=0,
    )


def _pulled(norm: FrozenNorm, direction: Tensor, position: int) -> Float[Tensor, " d_model"]:
    """Return the direction before a frozen norm that reads what `direction` reads behind it."""
    pulled = direction.double() * norm.gain
    if norm.centred:
        pulled = pulled - pulled.mean()
    return pulled * norm.scale[position]


def _add(
    nodes: Sequence[Node],
    sums: Tensor,
    largest: Tensor | None = None,
    sizes: Tensor | None = None,
) -> None:
    for place, node in enumerate(nodes):
        node.sums += float(sums[place])
        size = abs(float(sums[place])) if largest is None else float(largest[place])
        node.largest = max(node.largest, size)
        node.inbound += abs(float(sums[place])) if sizes is None else float(sizes[place])
