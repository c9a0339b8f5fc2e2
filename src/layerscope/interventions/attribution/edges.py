"""Edges: what one part writes, as another part reads it.

A writer is the embedding, a head, an attention bias or an MLP; a receiver is a head's queries, keys
or values, an MLP, or the logits. The edge from u to v is the effect of v alone reading the donor's
u: ``(donor - base of what u writes) · ∂metric/∂(what v reads)``, summed over positions and width
(edge attribution patching; Syed, Rager, Conmy 2023), with gradients at the base run or averaged
over interpolated inputs (EAP-IG; Hanna, Pezzelle, Belinkov 2024).

With ``qk="recomputed"`` edges into queries and keys are not linear in the attention scores: the
block's softmax is computed again with what v would read, and only what follows the pattern is
taken as linear. This is the remedy of AtP* (Kramár et al. 2024) for saturated attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.interventions.attribution.contrast import FIRST, Contrast, slopes
from layerscope.interventions.attribution.exact import ROWS, repeat
from layerscope.interventions.attribution.quadrature import Rule, points
from layerscope.interventions.stream import Writer, has_heads, writers, writings
from layerscope.models import Edit, LanguageModel, Replace, Scale, Site, Start

QK: TypeAlias = Literal["linear", "recomputed"]


@dataclass(frozen=True, order=True)
class Receiver:
    """One part that reads the stream.

    Attributes:
        layer: block; the number of blocks for the logits.
        kind: "q", "k", "v" (of one head; of one key-value head for k and v), "attn" (all of an
            attention that does not come apart), "mlp" or "logits".
        head: of q, k and v.
    """

    layer: int
    kind: str
    head: int = 0

    def __str__(self) -> str:
        """Return ``attn.3.head.1.q``, ``attn.3``, ``mlp.3`` or ``logits``."""
        if self.kind == "logits":
            return "logits"
        if self.kind in ("attn", "mlp"):
            return f"{self.kind}.{self.layer}"
        return f"attn.{self.layer}.head.{self.head}.{self.kind}"


Edge: TypeAlias = tuple[Writer, Receiver]


def sequential(model: LanguageModel, layer: int) -> bool:
    """Return True where a block's MLP reads what its attention wrote."""
    return model.backend.why_not(Site("resid_mid", layer)) is None


def splits(model: LanguageModel, layer: int) -> bool:
    """Return True where a block's attention comes apart into queries, keys, values and heads."""
    sites = (Site(f"attn.{leaf}", layer) for leaf in ("q", "k", "v", "pattern"))
    return has_heads(model, layer) and all(model.backend.why_not(site) is None for site in sites)


def receivers(model: LanguageModel) -> list[Receiver]:
    """Return every part of a model that reads the stream, in the order of the pass."""
    found: list[Receiver] = []
    for layer in range(model.n_layers):
        if splits(model, layer):
            for kind, count in (("q", model.n_heads), ("k", model.n_kv_heads)):
                found += [Receiver(layer, kind, head) for head in range(count)]
            found += [Receiver(layer, "v", head) for head in range(model.n_kv_heads)]
        else:
            found.append(Receiver(layer, "attn"))
        found.append(Receiver(layer, "mlp"))
    return [*found, Receiver(model.n_layers, "logits")]


def reaches(model: LanguageModel, writer: Writer, receiver: Receiver) -> bool:
    """Return True where a receiver reads what a writer wrote."""
    if writer.layer < receiver.layer:
        return True
    same = writer.layer == receiver.layer
    attention = writer.kind in ("head", "attn", "attn_bias")
    return same and attention and receiver.kind == "mlp" and sequential(model, receiver.layer)


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """Predicted effects of edges.

    Attributes:
        method: how they were found.
        contrast: what was asked.
        writers: rows of `values`. receivers: its columns.
        values: [writer, receiver, row], in units of the metric; zero where there is no edge.
        exists: which edges there are.
        remainder: [row], what attribution patching of the embedding has beyond the sum of the
            embedding's edges: zero up to rounding where every way of reading the stream was found
            (gates and routers beside q, k and v are not). None where scores are not linear.
    """

    method: str
    contrast: Contrast
    writers: Sequence[Writer]
    receivers: Sequence[Receiver]
    values: Float[Tensor, "writer receiver row"]
    exists: Bool[Tensor, "writer receiver"]
    remainder: Float[Tensor, " row"] | None = None
    notes: dict[str, object] = field(default_factory=lambda: {})

    @cached_property
    def mean(self) -> Float[Tensor, "writer receiver"]:
        """Mean score over the pairs."""
        return self.values.double().mean(-1)

    def __getitem__(self, edge: Edge) -> Float[Tensor, " row"]:
        """Return one edge's score for every pair."""
        return self.values[self.writers.index(edge[0]), self.receivers.index(edge[1])]

    def edges(self) -> list[Edge]:
        """Return every edge there is."""
        return [
            (writer, receiver)
            for at, writer in enumerate(self.writers)
            for to, receiver in enumerate(self.receivers)
            if bool(self.exists[at, to])
        ]

    def ranked(self, *, signed: bool = False, limit: int | None = None) -> list[Edge]:
        """Return edges by falling size of their mean score, or by falling score."""
        edges = self.edges()
        keys = self.mean[self.exists]
        order = torch.argsort(keys if signed else keys.abs(), descending=True, stable=True)
        return [edges[index] for index in order.tolist()[:limit]]

    def nodes(self) -> dict[Writer, Float[Tensor, " row"]]:
        """Return what each writer does through all of its edges together, [row] each."""
        sums = self.values.sum(1)
        return {writer: sums[at] for at, writer in enumerate(self.writers)}

    def cancelling(self, share: float = 0.1) -> list[Writer]:
        """Return writers whose edges pull apart: their sum is at most `share` of their sizes.

        Only writers with an edge at least a twentieth of the strongest one count.
        """
        sizes, sums = self.mean.abs().sum(1), self.mean.sum(1).abs()
        strong = self.mean.abs().amax(1) >= 0.05 * self.mean.abs().amax()
        found = strong & (sizes > 0) & (sums <= share * sizes)
        return [writer for writer, cancels in zip(self.writers, found, strict=True) if cancels]

    def table(self) -> pl.DataFrame:
        """Return one row per edge, the strongest first: ``writer, receiver, score, score_sd``."""
        rows = [
            {
                "writer": str(writer),
                "receiver": str(receiver),
                "score": float(self[writer, receiver].double().mean()),
                "score_sd": float(self[writer, receiver].double().std(correction=0)),
            }
            for writer, receiver in self.ranked()
        ]
        schema = {"writer": pl.String, "receiver": pl.String}
        return pl.DataFrame(rows, schema=schema | {"score": pl.Float64, "score_sd": pl.Float64})


def edge_attribution(
    contrast: Contrast,
    *,
    rule: Rule | None = None,
    steps: int = 5,
    qk: QK = "linear",
    rows: int = ROWS,
) -> EdgeScores:
    """Score every edge of a model.

    Args:
        contrast: what is asked.
        rule: average gradients over interpolated inputs by this rule; None takes them at the base
            run (one backward pass).
        steps: passes along that path.
        qk: "recomputed" computes the softmax again for edges into queries and keys, at the cost of
            three passes through one block for every writer below.
        rows: batch rows of such a pass, at most.

    Raises:
        ConfigError: an unknown rule or value of `qk`.
    """
    if qk not in ("linear", "recomputed"):
        raise ConfigError(f"qk is {qk!r}; use 'linear' or 'recomputed'")
    model = contrast.model
    sources, targets = writers(model), receivers(model)
    base = writings(model, contrast.base)
    donor = writings(model, contrast.donor)
    mask = contrast.base.attention_mask[..., None]
    changes = torch.stack([_wide(donor[u]) - _wide(base[u]) for u in sources])
    changes = torch.where(mask.to(changes.device), changes, torch.zeros(()).to(changes))
    exists = torch.tensor([[reaches(model, u, v) for v in targets] for u in sources])
    values = torch.zeros(*exists.shape, contrast.n_rows, dtype=changes.dtype)
    starts = contrast.values("base", [FIRST])[FIRST], contrast.values("donor", [FIRST])[FIRST]
    remainder = torch.zeros(contrast.n_rows, dtype=changes.dtype)
    patterns: dict[int, Tensor] = {}
    for place, weight in ((0.0, 1.0),) if rule is None else points(rule, steps):
        start = starts[0] + place * (starts[1] - starts[0])
        graph = _Graph(contrast, start, patterns=qk == "recomputed")
        for receiver, gradient in graph.gradients():
            at = targets.index(receiver)
            below = int(exists[:, at].sum())
            found = torch.einsum("urpd,rpd->ur", changes[:below], _wide(gradient))
            values[:below, at] += weight * found.cpu()
        whole = (changes[0] * _wide(graph.at_first)).sum((1, 2)).cpu()
        remainder += weight * whole
        for layer, gradient in graph.patterns.items():
            known = patterns.get(layer)
            patterns[layer] = weight * gradient + (0.0 if known is None else known)
    remainder = remainder - values[0].sum(0)
    notes: dict[str, object] = {"qk": qk, "rule": rule or "none", "steps": steps if rule else 1}
    if qk == "recomputed":
        linear = values.clone()
        _recompute(contrast, changes, patterns, targets, values, rows)
        notes["changed_by_softmax"] = float((values - linear).abs().amax())
    method = "edge attribution patching" if rule is None else f"EAP-IG ({rule}, {steps} steps)"
    return EdgeScores(
        method if qk == "linear" else f"{method}, softmax recomputed",
        contrast,
        sources,
        targets,
        values,
        exists,
        remainder,
        notes,
    )


class _Graph:
    """One pass with its autograd graph, and the gradients of what every receiver reads."""

    def __init__(self, contrast: Contrast, start: Tensor, *, patterns: bool) -> None:
        self._model = model = contrast.model
        layers = range(model.n_layers)
        self._last = Site("resid_post", model.n_layers - 1)
        self._read: list[tuple[Site, Site]] = []  # what a receiver computes, and what it reads
        for layer in layers:
            stream = Site("resid_pre", layer)
            if splits(model, layer):
                self._read += [(Site(f"attn.{leaf}", layer), stream) for leaf in "qkv"]
            else:
                self._read.append((Site("attn_in", layer), stream))
            middle = Site("resid_mid", layer) if sequential(model, layer) else stream
            self._read.append((Site("mlp_in", layer), middle))
        leaf = start.detach().clone().requires_grad_(True)
        edits: list[Edit] = [Replace(FIRST, leaf)]
        # A tensor of its own: without a norm, a sublayer reads the stream itself.
        inputs = {site for site, _ in self._read if site.kind in ("mlp_in", "attn_in")}
        edits += [Scale(site, 1.0) for site in sorted(inputs)]
        shown = [Site("attn.pattern", layer) for layer in layers if splits(model, layer)]
        shown = shown if patterns else []
        sites = [FIRST, self._last, *shown, *(site for pair in self._read for site in pair)]
        self._run = model.run(
            contrast.base,
            capture=list(dict.fromkeys(sites)),
            edits=edits,
            logits="last",
            gradients=True,
        )
        metric = contrast.metric_of(self._run)
        wanted = [FIRST, self._last, *(site for site, _ in self._read), *shown]
        found = slopes(metric, [self._run[site] for site in wanted], again=True)
        self._found = {
            site: torch.zeros_like(self._run[site]) if gradient is None else gradient
            for site, gradient in zip(wanted, found, strict=True)
        }
        self.at_first = self._found[FIRST]
        self.patterns = {site.layer or 0: self._found[site].detach() for site in shown}

    def gradients(self) -> Iterator[tuple[Receiver, Float[Tensor, "row pos d_model"]]]:
        """Yield every receiver and the metric's gradient with respect to what it alone reads."""
        for site, stream in self._read:
            gradient, layer = self._found[site], site.layer or 0
            if site.kind in ("attn_in", "mlp_in"):
                kind = "mlp" if site.kind == "mlp_in" else "attn"
                yield Receiver(layer, kind), self._pull(site, stream, gradient)
                continue
            for head in range(gradient.shape[2]):
                seed = torch.zeros_like(gradient)
                seed[:, :, head] = gradient[:, :, head]
                yield Receiver(layer, site.kind[-1], head), self._pull(site, stream, seed)
        yield Receiver(self._model.n_layers, "logits"), self._found[self._last]

    def _pull(self, site: Site, stream: Site, seed: Tensor) -> Tensor:
        if not bool(seed.any()):
            return torch.zeros_like(self._run[stream])
        with torch.enable_grad():
            (pulled,) = torch.autograd.grad(
                self._run[site], self._run[stream], seed, retain_graph=True
            )
        return pulled


def _recompute(
    contrast: Contrast,
    changes: Float[Tensor, "writer row pos d_model"],
    gradients: dict[int, Float[Tensor, "row head query key"]],
    targets: Sequence[Receiver],
    values: Float[Tensor, "writer receiver row"],
    rows: int,
) -> None:
    """Put in `values` the edges into queries and keys with the softmax computed again."""
    model, n_rows = contrast.model, contrast.n_rows
    sources = writers(model)
    mask = contrast.base.attention_mask
    per_pass = max(1, rows // n_rows)
    for layer, gradient in gradients.items():
        stream, pattern = Site("resid_pre", layer), Site("attn.pattern", layer)
        base = contrast.values("base", [stream, pattern])
        real = mask[:, None, :, None].to(gradient.device)
        weights = torch.where(real, _wide(gradient), torch.zeros((), dtype=changes.dtype))
        below = [at for at, writer in enumerate(sources) if writer.layer < layer]
        for first in range(0, len(below), per_pass):
            chunk = below[first : first + per_pass]
            batch = repeat(contrast.base, len(chunk))
            before = base[stream].repeat(len(chunk), 1, 1)
            changed = (_wide(base[stream]) + changes[chunk]).flatten(0, 1).to(before)
            kinds = (Site("attn.q", layer), Site("attn.k", layer))
            read = model.run(
                batch, start=Start(layer, changed), capture=kinds, stop_after=layer, logits=None
            )
            for site in kinds:
                looked = model.run(
                    batch,
                    start=Start(layer, before),
                    edits=[Replace(site, read[site])],
                    capture=pattern,
                    stop_after=layer,
                    logits=None,
                )[pattern]
                moved = _wide(looked).unflatten(0, (len(chunk), n_rows)) - _wide(base[pattern])
                effect = (moved * weights).sum((-1, -2)).cpu()  # [writer, row, head]
                count = model.n_heads if site.kind == "attn.q" else model.n_kv_heads
                effect = effect.unflatten(-1, (count, -1)).sum(-1)
                for head in range(count):
                    to = targets.index(Receiver(layer, site.kind[-1], head))
                    values[chunk, to] = effect[..., head]


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
