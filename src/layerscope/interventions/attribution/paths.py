"""Exact effects of edges: path patching, one batch row per edge and pair.

What a receiver reads is exchanged by itself, and everything after it runs as it does. (Goldowsky-
Dill et al. 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.interventions.attribution.contrast import Contrast
from layerscope.interventions.attribution.edges import Edge, Receiver, sequential
from layerscope.interventions.attribution.exact import ROWS, repeat
from layerscope.interventions.stream import writings
from layerscope.models import Edit, Replace, Site, Start


def exact_edges(
    contrast: Contrast, edges: Sequence[Edge], *, rows: int = ROWS
) -> dict[Edge, Float[Tensor, " row"]]:
    """Patch every edge by itself and return the metric's change, [row] each."""
    base = writings(contrast.model, contrast.base)
    donor = writings(contrast.model, contrast.donor)
    mask = contrast.base.attention_mask[..., None]
    before, _ = contrast.ends
    per_pass = max(1, rows // contrast.n_rows)
    grouped: dict[tuple[int, str], list[Edge]] = {}
    for edge in dict.fromkeys(edges):
        grouped.setdefault((edge[1].layer, edge[1].kind), []).append(edge)
    found: dict[Edge, Tensor] = {}
    for group in grouped.values():
        for first in range(0, len(group), per_pass):
            chunk = group[first : first + per_pass]
            changes = [donor[writer] - base[writer] for writer, _ in chunk]
            zero = torch.zeros((), dtype=changes[0].dtype, device=changes[0].device)
            kept = torch.where(mask.to(zero.device), torch.stack(changes), zero)
            after = _patched(contrast, [receiver for _, receiver in chunk], kept)
            for edge, metric in zip(chunk, after, strict=True):
                found[edge] = metric - before
    return {edge: found[edge] for edge in edges}


def _patched(
    contrast: Contrast,
    targets: Sequence[Receiver],
    changes: Float[Tensor, "edge row pos d_model"],
) -> list[Float[Tensor, " row"]]:
    """Return the metric of runs in which each receiver (all of one block and kind) reads more."""
    model, n_rows = contrast.model, contrast.n_rows
    count, kind = len(targets), targets[0].kind
    batch = repeat(contrast.base, count)
    layer = min(targets[0].layer, model.n_layers - 1)
    stream, site = _sites(contrast, targets[0])
    base = contrast.values("base", [Site("resid_pre", layer), stream])
    start = Start(layer, base[Site("resid_pre", layer)].repeat(count, 1, 1))
    changed = (base[stream] + changes).flatten(0, 1)
    edits: list[Edit] = []
    if kind == "logits":
        edits.append(Replace(stream, changed))
    else:
        read = model.run(
            batch,
            start=start,
            edits=[Replace(stream, changed)],
            capture=site,
            stop_after=layer,
            logits=None,
        )[site]
        for index, receiver in enumerate(targets):
            rows = slice(index * n_rows, (index + 1) * n_rows)
            where, value = site, read[rows]
            if kind in ("q", "k", "v"):
                where, value = head_site(contrast, receiver), value[:, :, receiver.head]
            edits.append(Replace(where, value, rows=list(range(rows.start, rows.stop))))
    result = model.run(batch, start=start, edits=edits, logits="last")
    assert result.logits is not None
    logits = result.logits[:, -1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return [contrast.metric(part) for part in wide.split(n_rows)]


def _sites(contrast: Contrast, receiver: Receiver) -> tuple[Site, Site]:
    """Return the stream that a receiver reads, and what it makes of it."""
    model, layer = contrast.model, receiver.layer
    if receiver.kind == "logits":
        last = Site("resid_post", model.n_layers - 1)
        return last, last
    if receiver.kind == "mlp":
        stream = "resid_mid" if sequential(model, layer) else "resid_pre"
        return Site(stream, layer), Site("mlp_in", layer)
    name = "attn_in" if receiver.kind == "attn" else f"attn.{receiver.kind}"
    return Site("resid_pre", layer), Site(name, layer)


def head_site(contrast: Contrast, receiver: Receiver) -> Site:
    """Return the site of a receiver's own queries, keys or values."""
    model, kind = contrast.model, f"attn.{receiver.kind}"
    if receiver.kind in ("k", "v") and model.n_kv_heads < model.n_heads:
        return Site(kind, receiver.layer, kv_head=receiver.head)
    return Site(kind, receiver.layer, receiver.head)
