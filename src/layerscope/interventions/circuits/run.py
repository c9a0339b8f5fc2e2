"""A run in which only a circuit's edges carry the base run, and all others the donor's.

Every receiver reads its own residual: what the donor's stream holds there, plus, for each writer
whose edge is kept, what that writer writes in this run less what it wrote in the donor's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerscope.interventions.attribution.contrast import Contrast
from layerscope.interventions.attribution.edges import Receiver, receivers, sequential, splits
from layerscope.interventions.attribution.exact import repeat
from layerscope.interventions.stream import EMBED, Writer, block_writings, sites_of, writers
from layerscope.models import Replace, Site, Start


def circuit_metric(
    contrast: Contrast, kept: Bool[Tensor, "writer receiver"]
) -> Float[Tensor, " row"]:
    """Return the metric of a run through the kept edges alone.

    With every edge kept it is the base run's, with none the donor's.

    Args:
        contrast: base and donor.
        kept: by writer and receiver, in the order of `writers` and `receivers`.
    """
    return _CircuitRun(contrast, kept).metric()


class _CircuitRun:
    """The state of one run: what each writer wrote so far, less what it wrote in the donor's."""

    def __init__(self, contrast: Contrast, kept: Bool[Tensor, "writer receiver"]) -> None:
        self._contrast, self._model = contrast, contrast.model
        self._kept = kept
        self._writers = {writer: at for at, writer in enumerate(writers(self._model))}
        self._receivers = {receiver: at for at, receiver in enumerate(receivers(self._model))}
        layers = range(self._model.n_layers)
        streams = [Site("resid_pre", layer) for layer in layers]
        streams += [Site("resid_mid", layer) for layer in layers if sequential(self._model, layer)]
        streams.append(Site("resid_post", self._model.n_layers - 1))
        written = [site for layer in layers for site in sites_of(self._model, layer)]
        self._donor = contrast.values("donor", [*streams, *written])
        first = Site("resid_pre", 0)
        base = contrast.values("base", [first])[first]
        self._moved: dict[Writer, Tensor] = {EMBED: base - self._donor[first]}

    def metric(self) -> Float[Tensor, " row"]:
        model = self._model
        for layer in range(model.n_layers):
            self._attention(layer)
            self._mlp(layer)
        last = Site("resid_post", model.n_layers - 1)
        final = self._input(last, Receiver(model.n_layers, "logits"))
        layer = model.n_layers - 1
        return self._contrast.measure(
            self._contrast.base,
            [Replace(last, final)],
            start=Start(layer, self._donor[Site("resid_pre", layer)]),
        )

    def _input(self, stream: Site, receiver: Receiver) -> Float[Tensor, "row pos d_model"]:
        column = self._kept[:, self._receivers[receiver]]
        total = self._donor[stream]
        for writer, moved in self._moved.items():
            if bool(column[self._writers[writer]]):
                total = total + moved
        return total

    def _attention(self, layer: int) -> None:
        model, batch = self._model, self._contrast.base
        stream = Site("resid_pre", layer)
        names = sites_of(model, layer)[2:]  # without attn_out and mlp_out
        wanted = [Site("attn_out", layer), *names]
        if not splits(model, layer):
            begin = Start(layer, self._input(stream, Receiver(layer, "attn")))
            run = model.run(batch, start=begin, capture=wanted, stop_after=layer, logits=None)
        else:
            edits = [Replace(site, value) for site, value in self._read(layer).items()]
            run = model.run(
                batch,
                start=Start(layer, self._donor[stream]),
                edits=edits,
                capture=wanted,
                stop_after=layer,
                logits=None,
            )
        mlp = Site("mlp_out", layer)
        values = {site: run[site] for site in wanted} | {mlp: self._donor[mlp]}
        self._moves(layer, values, without="mlp")

    def _read(self, layer: int) -> dict[Site, Tensor]:
        """Return queries, keys and values, each head's from what it reads itself."""
        model = self._model
        sites = {leaf: Site(f"attn.{leaf}", layer) for leaf in "qkv"}
        counts = {"q": model.n_heads, "k": model.n_kv_heads, "v": model.n_kv_heads}
        targets = [Receiver(layer, leaf, head) for leaf in "qkv" for head in range(counts[leaf])]
        # Receivers that keep the same edges read the same.
        below = [at for writer, at in self._writers.items() if writer in self._moved]
        keys = [tuple(self._kept[below, self._receivers[target]].tolist()) for target in targets]
        different = list(dict.fromkeys(keys))
        stream = Site("resid_pre", layer)
        inputs = [self._input(stream, targets[keys.index(key)]) for key in different]
        run = model.run(
            repeat(self._contrast.base, len(different)),
            start=Start(layer, torch.cat(inputs)),
            capture=list(sites.values()),
            stop_after=layer,
            logits=None,
        )
        found: dict[Site, Tensor] = {}
        for leaf, site in sites.items():
            shaped = run[site].unflatten(0, (len(different), self._contrast.n_rows))
            heads = [
                shaped[different.index(key)][:, :, target.head]
                for target, key in zip(targets, keys, strict=True)
                if target.kind == leaf
            ]
            found[site] = torch.stack(heads, dim=2)
        return found

    def _mlp(self, layer: int) -> None:
        model, receiver = self._model, Receiver(layer, "mlp")
        before, out = Site("resid_pre", layer), Site("mlp_out", layer)
        if sequential(model, layer):
            middle = Site("resid_mid", layer)
            begin = Start(layer, self._donor[before])
            edits: Sequence[Replace] = [Replace(middle, self._input(middle, receiver))]
        else:
            begin, edits = Start(layer, self._input(before, receiver)), []
        run = model.run(
            self._contrast.base,
            start=begin,
            edits=edits,
            capture=out,
            stop_after=layer,
            logits=None,
        )
        self._moved[Writer(layer, "mlp")] = run[out] - self._donor[out]

    def _moves(self, layer: int, values: dict[Site, Tensor], *, without: str) -> None:
        now = block_writings(self._model, layer, values)
        donor = block_writings(self._model, layer, self._donor)
        for writer, value in now.items():
            if writer.kind != without:
                self._moved[writer] = value - donor[writer]
