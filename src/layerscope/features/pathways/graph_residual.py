"""Attribution graphs from dictionaries of the residual stream.

A dictionary of the stream after a block explains all that passes there: its features, its error and
its bias sum to the stream. So the graph is cut at every dictionary, and an edge leads from one to
the next above it. In between, attention patterns and norms are held and every MLP is replaced by
its tangent at this prompt; what the MLP writes beyond its tangent is a node of its own ("mlp"), so
that sums stay exact (sparse feature circuits, Marks et al. 2024, made complete).

Products along paths would count what overlapping features share once for each of them, at every
dictionary again. The effect on the first logit is therefore taken from a cotangent of its own that
is never cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.features.library import DictionarySet
from layerscope.features.pathways.graph_base import Active, GraphBase, along
from layerscope.features.pathways.pruning import GraphOptions, Key, Node, add
from layerscope.models import Apply, LanguageModel, Site, Start
from layerscope.models.batched_gradients import pull_back
from layerscope.models.prompts import PromptsLike

_CHUNK = 64  # cotangents of one backward pass


class ResidualGraph(GraphBase):
    """A graph whose features are those of dictionaries of ``resid_post``."""

    basis = "residual dictionaries"

    def __init__(
        self,
        model: LanguageModel,
        prompt: PromptsLike,
        dictionaries: DictionarySet,
        options: GraphOptions,
    ) -> None:
        super().__init__(model, prompt, dictionaries, options)
        self._active: dict[int, Active] = {}
        self.owed: dict[Key, float] = {}
        self.errors: dict[int, Tensor] = {}
        self.biases: dict[int, Tensor] = {}
        for dictionary in dictionaries:
            layer = dictionary.layer
            stream = self.stream[layer + 1]
            found = self.encode(dictionary, stream)
            self.biases[layer] = dictionary.decoder_bias.cpu().double()
            self.errors[layer] = stream.double() - self.written(found, layer) - self.biases[layer]
            self._active[layer] = found
            dictionary.release()

    @property
    def effects(self) -> dict[Key, float]:
        """What the first logit owes to every feature."""
        return self.owed

    @property
    def active(self) -> Mapping[int, Active]:
        """What is active, by layer."""
        return self._active

    def sweep(self) -> list[Node]:
        """Return all expanded nodes, from the top down."""
        nodes = self.logits()
        live: Sequence[Node] = nodes
        cotangents = self.join(None, live)
        first = cotangents[:1]  # of the first logit, never cut
        left = self.options.max_features
        for layer in reversed(range(self.model.n_layers)):
            if layer in self._active:
                chosen = self._cut(layer, live, cotangents, left)
                self._effects(layer, first[0])
                left -= len(chosen)
                nodes, live = [*nodes, *chosen], chosen
                cotangents = self.join(None, live)
            if not live:
                return nodes
            cotangents = self._through(layer, live, cotangents)
            first = self._pulled(layer, first)
        self.add_tokens(live, cotangents)
        return nodes

    def _cut(self, layer: int, nodes: Sequence[Node], cotangents: Tensor, left: int) -> list[Node]:
        """Explain nodes by a dictionary, and return its features of most influence."""
        source = self._active[layer]
        add(nodes, (cotangents @ self.biases[layer]).sum(-1))
        self._listed(("error", layer), nodes, along(cotangents, self.errors[layer]))
        if not len(source.ids):
            return []
        found = self.onto(cotangents, source, layer) * source.values
        add(nodes, found.sum(1), found.abs().amax(1), found.abs().sum(1))
        # Layers below must have their turn: a share of what is left.
        below = sum(1 for each in self._active if each <= layer)
        order = self.strongest(nodes, found, -(-left // below) if left > 0 else 0)
        for place, node in enumerate(nodes):
            for entry in order:
                key = ("feature", layer, int(source.ids[entry]), int(source.positions[entry]))
                node.edges[key] = float(found[place, entry])
            node.unlisted += float(found[place].abs().sum() - found[place, order].abs().sum())
        return [self._node(source, entry) for entry in order]

    def _node(self, source: Active, entry: int) -> Node:
        position, read = int(source.positions[entry]), source.reads[entry]
        bias = float(source.biases[entry])
        return Node(
            kind="feature",
            layer=source.layer,
            feature=int(source.ids[entry]),
            position=position,
            token=self.tokens[position],
            value=float(read @ self.stream[source.layer + 1, position].double()) + bias,
            activation=float(source.values[entry]),
            influence=float(self.influence[entry]),
            constant=bias,
            cotangent=read,
        )

    def _effects(self, layer: int, cotangent: Float[Tensor, "pos d_model"]) -> None:
        """Keep what the first logit owes to every active feature of a layer."""
        source = self._active[layer]
        owed = self.onto(cotangent[None], source, layer)[0] * source.values
        for feature, position, value in zip(
            source.ids.tolist(), source.positions.tolist(), owed.tolist(), strict=True
        ):
            self.owed["feature", layer, feature, position] = value

    def _pulled(self, layer: int, cotangents: Tensor) -> Tensor:
        """Pull cotangents back through a block, and list nothing."""
        parallel = self.model.backend.why_not(Site("resid_mid", layer)) is not None
        tangent, _ = self._tangent(layer, parallel, cotangents)
        if parallel:
            return self.through(layer, cotangents) + tangent
        return self.through(layer, cotangents + tangent)

    def _through(
        self, layer: int, nodes: Sequence[Node], cotangents: Float[Tensor, "node pos d_model"]
    ) -> Float[Tensor, "node pos d_model"]:
        """Pull cotangents back through a block, and list what its MLP writes beyond its tangent."""
        parallel = self.model.backend.why_not(Site("resid_mid", layer)) is not None
        tangent, stream = self._tangent(layer, parallel, cotangents)
        written = along(cotangents, self.mlp_out[layer])
        self._listed(("mlp", layer), nodes, written - along(tangent, stream))
        bias = self.attention_bias(layer)
        if parallel:
            add(nodes, along(cotangents, bias).sum(1))
            return self.through(layer, cotangents) + tangent
        cotangents = cotangents + tangent
        add(nodes, along(cotangents, bias).sum(1))
        return self.through(layer, cotangents)

    def _tangent(
        self, layer: int, parallel: bool, cotangents: Tensor
    ) -> tuple[Float[Tensor, "node pos d_model"], Float[Tensor, "pos d_model"]]:
        """Return cotangents pulled back through the MLP alone, its norm held, and what it reads."""
        norm = self.norm(layer)
        below = self.residuals[layer : layer + 1]
        reads = Site("resid_pre" if parallel else "resid_mid", layer)
        start = Start(layer, below)
        kept = self.model.run(
            self.linear.batch, start=start, stop_after=layer, capture=reads, logits=None
        )
        with torch.enable_grad():
            leaf = kept[reads][0].detach().clone().requires_grad_(True)
            centred = leaf - leaf.mean(-1, keepdim=True) if norm.centred else leaf
            held = (norm.gain, norm.bias, norm.scale)
            gain, bias, scale = (part.to(leaf.dtype).to(leaf.device) for part in held)
            normed = centred * gain * scale[:, None] + bias
            above = self.model.run(
                self.linear.batch,
                start=start,
                stop_after=layer,
                capture=f"mlp_out.{layer}",
                edits=[Apply(f"mlp_in.{layer}", lambda _values, _context: normed[None])],
                logits=None,
                gradients="batched",
            )[f"mlp_out.{layer}"][0]
            pulled = [
                pull_back(above, [leaf], part)[0]
                for part in cotangents.to(above.dtype).to(above.device).split(_CHUNK)
            ]
        return torch.cat(pulled).cpu().double(), leaf.detach().cpu().double()

    def _listed(self, key: tuple[str, int], nodes: Sequence[Node], values: Tensor) -> None:
        """Add sources of one kind at every position."""
        kind, layer = key
        for place, node in enumerate(nodes):
            for position, value in enumerate(values[place].tolist()):
                if value:
                    node.edges[kind, layer, -1, position] = value
        add(nodes, values.sum(1), values.abs().amax(1), values.abs().sum(1))
