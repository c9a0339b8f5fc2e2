"""The attribution graph of one prompt: features, errors and tokens behind its next token.

With transcoders, MLPs are replaced by their features, what these do not explain stays as error
nodes, and attention patterns and norms are held fixed. Every kept node is then an exact sum over
its sources (Ameisen et al., 2025, "Circuit Tracing"), and the graph says by how much that fails.

One sweep from the top of the model down makes it: a layer's features are chosen by their influence
on what was chosen above them, and join the sweep there. `graph_residual` does the same for
dictionaries of the residual stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.library import DictionarySet
from layerscope.features.pathways.graph_base import Active, AttributionGraph, GraphBase, along
from layerscope.features.pathways.graph_residual import ResidualGraph
from layerscope.features.pathways.pruning import GraphOptions, Node, add
from layerscope.models import LanguageModel, Site
from layerscope.models.prompts import PromptsLike


def attribution_graph(
    model: LanguageModel,
    prompt: PromptsLike,
    dictionaries: DictionarySet,
    options: GraphOptions | None = None,
) -> AttributionGraph:
    """Explain a prompt's next token by features.

    Args:
        model: the model the dictionaries were made for.
        prompt: one prompt.
        dictionaries: transcoders that read ``mlp_in`` and write ``mlp_out``, cross-layer or not;
            or autoencoders of ``resid_post``.
        options: how large the graph is.

    Raises:
        DictionaryError: the dictionaries are neither, or belong elsewhere.
        CapabilityError: the family's attention or norms cannot be held fixed.
    """
    options = options or GraphOptions()
    kinds = {(each.reads.kind, *(site.kind for site in each.writes)) for each in dictionaries}
    if {frozenset(kind) for kind in kinds} == {frozenset(("resid_post",))}:
        return ResidualGraph(model, prompt, dictionaries, options).build()
    for each in dictionaries:
        if each.reads.kind != "mlp_in" or {site.kind for site in each.writes} != {"mlp_out"}:
            raise DictionaryError(
                f"an attribution graph takes transcoders from mlp_in to mlp_out or dictionaries of "
                f"resid_post, but this one reads {each.reads} and writes {each.writes[0]}"
            )
    return TranscoderGraph(model, prompt, dictionaries, options).build()


class TranscoderGraph(GraphBase):
    """MLPs replaced by transcoders, cross-layer ones and those with a skip among them."""

    basis = "transcoders"

    def __init__(
        self,
        model: LanguageModel,
        prompt: PromptsLike,
        dictionaries: DictionarySet,
        options: GraphOptions,
    ) -> None:
        super().__init__(model, prompt, dictionaries, options)
        self.errors = [values.clone() for values in self.mlp_out]
        self.biases: dict[int, Tensor] = defaultdict(
            lambda: torch.zeros(model.d_model, dtype=torch.float64)
        )
        self.skips: dict[int, Tensor] = {}
        self._active: dict[int, Active] = {}
        for dictionary in dictionaries:
            layer = dictionary.layer
            found = self.encode(dictionary, self.mlp_in[layer])
            for to in found.writes:
                self.errors[to] -= self.written(found, to)
            if dictionary.skip is not None:
                self.skips[layer] = dictionary.skip.cpu().double()
                self.errors[layer] -= self.mlp_in[layer].double() @ self.skips[layer].T
            bias = dictionary.decoder_bias.cpu().double()
            self.errors[layer] -= bias
            self.biases[layer] = self.biases[layer] + bias
            self._active[layer] = found
            dictionary.release()

    @property
    def active(self) -> Mapping[int, Active]:
        """What is active, by layer."""
        return self._active

    def sweep(self) -> list[Node]:
        """Return all expanded nodes, from the top down."""
        nodes = self.logits()
        cotangents = self.join(None, nodes)
        effects: dict[int, Tensor] = {}
        left = self.options.max_features
        for layer in reversed(range(self.model.n_layers)):
            self._collect(layer, nodes, cotangents, effects)
            chosen = self._choose(layer, nodes, effects, left)
            left -= len(chosen)
            skipped = self._through_skip(layer, nodes, cotangents)
            parallel = self.model.backend.why_not(Site("resid_mid", layer)) is not None
            if not parallel:  # with the MLP held, the stream before it is as good as behind it
                cotangents = self.join(_sum(cotangents, skipped), chosen)
                nodes = [*nodes, *chosen]
            add(nodes, along(cotangents, self.attention_bias(layer)).sum(1))
            cotangents = self.through(layer, cotangents)
            if parallel:  # its MLP reads what its attention reads
                cotangents = self.join(_sum(cotangents, skipped), chosen)
                nodes = [*nodes, *chosen]
        self.add_tokens(nodes, cotangents)
        return nodes

    def _through_skip(self, layer: int, nodes: Sequence[Node], cotangents: Tensor) -> Tensor | None:
        """Return cotangents behind a skip, if there is one: of what is read before its norm."""
        skip = self.skips.get(layer)
        if skip is None:
            return None
        behind = cotangents @ skip
        norm = self.norm(layer)
        add(nodes, (behind @ norm.bias).sum(1))
        return torch.stack([norm.pull(each) for each in behind])

    def _collect(
        self, layer: int, nodes: Sequence[Node], cotangents: Tensor, effects: dict[int, Tensor]
    ) -> None:
        """Add what is written at a layer: features, errors, biases."""
        add(nodes, (cotangents @ self.biases[layer]).sum(-1))
        errors = along(cotangents, self.errors[layer])
        for place, node in enumerate(nodes):
            for position, value in enumerate(errors[place].tolist()):
                if value:
                    node.edges["error", layer, -1, position] = value
        add(nodes, errors.sum(1), errors.abs().amax(1), errors.abs().sum(1))
        for source in self.active.values():
            if layer not in source.writes or not len(source.ids):
                continue
            found = self.onto(cotangents, source, layer) * source.values
            add(nodes, found.sum(1), found.abs().amax(1), found.abs().sum(1))
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
        # Layers below must have their turn: a share of what is left, at least one.
        share = max(1, -(-left // (layer + 1))) if left > 0 else 0
        chosen: list[Node] = []
        order = self.strongest(nodes, found, share)
        for place, node in enumerate(nodes):
            node.unlisted += float(found[place].abs().sum() - found[place, order].abs().sum())
        for entry in order:
            norm = self.norm(layer)
            position, feature = int(source.positions[entry]), int(source.ids[entry])
            read = source.reads[entry]
            here = self.mlp_in[layer][position].double()
            for place, node in enumerate(nodes):
                node.edges["feature", layer, feature, position] = float(found[place, entry])
            pulled = torch.zeros(self.n, self.model.d_model, dtype=torch.float64)
            pulled[position] = read
            chosen.append(
                Node(
                    kind="feature",
                    layer=layer,
                    feature=feature,
                    position=position,
                    token=self.tokens[position],
                    value=float(read @ here + source.biases[entry]),
                    activation=float(source.values[entry]),
                    influence=float(self.influence[entry]),
                    constant=float(read @ norm.bias + source.biases[entry]),
                    cotangent=norm.pull(pulled)[position],
                )
            )
        return chosen


def _sum(cotangents: Tensor, skipped: Tensor | None) -> Tensor:
    return cotangents if skipped is None else cotangents + skipped
