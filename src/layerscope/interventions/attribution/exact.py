"""Exact effects: one batch row per node and pair, each with its own patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.interventions.attribution.contrast import Contrast
from layerscope.interventions.attribution.nodes import HEAD_SITES, Node, by_layer
from layerscope.models import Edit, Replace, Site, Start, TokenBatch

ROWS = 64
"""Batch rows of one pass, at most (one node's pairs always stay together)."""


def exact_effects(
    contrast: Contrast, nodes: Sequence[Node], *, rows: int = ROWS
) -> dict[Node, Float[Tensor, " row"]]:
    """Patch every node by itself and return the metric's change, [row] each.

    A pass holds many nodes of one block and starts there, from the base run's residual. A node at
    a position that a shorter prompt does not have changes nothing in that prompt.
    """
    grouped: dict[int, list[Node]] = {}
    for node in dict.fromkeys(nodes):
        grouped.setdefault(node.site.layer or 0, []).append(node)
    before, _ = contrast.ends
    per_pass = max(1, rows // contrast.n_rows)
    found: dict[Node, Tensor] = {}
    for layer in sorted(grouped):
        sites = [*dict.fromkeys(node.site for node in grouped[layer])]
        begin = Site("resid_pre", layer)
        base = contrast.values("base", [*sites, begin])
        donor = contrast.values("donor", sites)
        for first in range(0, len(grouped[layer]), per_pass):
            chunk = grouped[layer][first : first + per_pass]
            after = _patched(contrast, chunk, base, donor, base[begin])
            for node, metric in zip(chunk, after, strict=True):
                found[node] = metric - before
    return {node: found[node] for node in nodes}


def joint_effect(contrast: Contrast, nodes: Sequence[Node]) -> Float[Tensor, " row"]:
    """Patch all nodes at once (donor values everywhere) and return the metric's change, [row]."""
    sites = [*dict.fromkeys(node.site for node in nodes)]
    base, donor = contrast.values("base", sites), contrast.values("donor", sites)
    edits: list[Edit] = []
    for layer_sites in by_layer(sites).values():
        for site in layer_sites:
            edits += _site_edits(contrast, [n for n in nodes if n.site == site], base, donor)
    return contrast.measure(contrast.base, edits) - contrast.ends[0]


def _site_edits(
    contrast: Contrast, nodes: Sequence[Node], base: dict[Site, Tensor], donor: dict[Site, Tensor]
) -> list[Edit]:
    """Return edits that put every node's donor value in, each over what others left."""
    edits: list[Edit] = []
    everyone = range(contrast.n_rows)
    for node in nodes:
        if node.site.kind == "mlp.post" and node.unit is not None:
            continue
        edits += node_edits(contrast, node, everyone, base[node.site], donor[node.site])
    units = [node for node in nodes if node.site.kind == "mlp.post" and node.unit is not None]
    if units:
        value = base[units[0].site].clone()
        for node in units:
            _put_unit(contrast, value, donor[node.site], node)
        edits.append(Replace(units[0].site, value))
    return edits


def _put_unit(contrast: Contrast, value: Tensor, donor: Tensor, node: Node) -> None:
    if node.position is None:
        value[..., node.unit] = donor[..., node.unit]
        return
    for row, length in enumerate(contrast.base.lengths):
        if -length <= node.position < length:
            column = contrast.base.column(row, node.position)
            value[row, column, node.unit] = donor[row, column, node.unit]


def _patched(
    contrast: Contrast,
    nodes: Sequence[Node],
    base: dict[Site, Tensor],
    donor: dict[Site, Tensor],
    residual: Float[Tensor, "row pos d_model"],
) -> list[Float[Tensor, " row"]]:
    n_rows = contrast.n_rows
    batch = repeat(contrast.base, len(nodes))
    edits: list[Edit] = []
    for index, node in enumerate(nodes):
        rows = range(index * n_rows, (index + 1) * n_rows)
        edits += node_edits(contrast, node, rows, base[node.site], donor[node.site])
    layer = nodes[0].site.layer or 0
    start = Start(layer, residual.repeat(len(nodes), 1, 1))
    embeds = any(node.site.kind == "embed" for node in nodes)
    result = contrast.model.run(batch, edits=edits, start=None if embeds else start, logits="last")
    assert result.logits is not None
    logits = result.logits[:, -1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return [contrast.metric(part) for part in wide.split(n_rows)]


def node_edits(
    contrast: Contrast,
    node: Node,
    rows: Sequence[int],
    base: Float[Tensor, "row pos *width"],
    donor: Float[Tensor, "row pos *width"],
) -> list[Edit]:
    """Return the edits that put a node's donor value into these batch rows (one per pair)."""
    site, value = node.site, donor
    if node.unit is not None and site.kind in HEAD_SITES:
        site, value = head_site(contrast, node), donor[:, :, node.unit]
    elif node.unit is not None:
        value = base.clone()
        value[..., node.unit] = donor[..., node.unit]
    if node.position is None:
        return [Replace(site, value, rows=list(rows))]
    edits: list[Edit] = []
    for pair, row in enumerate(rows):
        length = contrast.base.lengths[pair]
        if -length <= node.position < length:
            column = contrast.base.column(pair, node.position)
            here = value[pair, column]
            edits.append(Replace(site, here, rows=row, positions=node.position))
    return edits


def head_site(contrast: Contrast, node: Node) -> Site:
    """Return the site of a node's single head; a key-value head where several heads share one."""
    shared = contrast.model.n_kv_heads < contrast.model.n_heads
    if shared and node.site.kind in ("attn.k", "attn.v"):
        return replace(node.site, kv_head=node.unit)
    return replace(node.site, head=node.unit)


def repeat(batch: TokenBatch, times: int) -> TokenBatch:
    """Return a batch with all its rows repeated, in order."""
    return TokenBatch(
        batch.ids.repeat(times, 1),
        batch.attention_mask.repeat(times, 1),
        batch.lengths * times,
        batch.padding_side,
    )
