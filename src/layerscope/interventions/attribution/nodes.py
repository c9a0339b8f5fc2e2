"""What is scored: nodes of a model, and the scores that a method gave them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.interventions.attribution.contrast import Contrast
from layerscope.models import LanguageModel, Site, TokenBatch
from layerscope.models.sites import expand

HEAD_SITES = ("attn.z", "attn.q", "attn.k", "attn.v")
UNIT_SITES = (*HEAD_SITES, "mlp.post")
_WHOLE_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed")

GROUPS = {
    "residual": ("resid_pre.*",),
    "attn_out": ("attn_out.*",),
    "mlp_out": ("mlp_out.*",),
    "heads": ("attn.*.z",),
    "queries": ("attn.*.q",),
    "keys": ("attn.*.k",),
    "values": ("attn.*.v",),
    "neurons": ("mlp.*.post",),
}


@dataclass(frozen=True)
class Node:
    """One thing whose value can be exchanged.

    Attributes:
        site: where; a site of all heads, or of all neurons, where `unit` chooses one of them.
        unit: head (key-value head for keys and values) or neuron, or None for the whole vector.
        position: token position in the unpadded prompt, or None for all positions at once.
    """

    site: Site
    unit: int | None = None
    position: int | None = None

    def __str__(self) -> str:
        """Return ``attn.0.head.3.z``, ``mlp.2.post[17]``, ``resid_pre.4@-1``."""
        name = str(self.site)
        if self.unit is not None:
            if self.site.kind == "mlp.post":
                name = f"{name}[{self.unit}]"
            else:
                group, layer, leaf = name.split(".")
                name = f"{group}.{layer}.head.{self.unit}.{leaf}"
        return name if self.position is None else f"{name}@{self.position}"


def resolve_sites(model: LanguageModel, names: str | Sequence[str]) -> list[Site]:
    """Return the sites that groups ("heads", "mlp_out", ...) and patterns of names stand for.

    Raises:
        ConfigError: a site has no nodes (scores and patterns, say).
        SiteError: a name is unknown.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    patterns = [pattern for name in wanted for pattern in GROUPS.get(name, (name,))]
    sites = expand(
        patterns,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads,
        available=lambda site: model.backend.why_not(site) is None,
    )
    for site in sites:
        whole = site.head is None and site.kv_head is None
        if site.kind not in (*_WHOLE_SITES, *UNIT_SITES) or not whole:
            raise ConfigError(
                f"'{site}' cannot be scored; use {', '.join(GROUPS)}, or sites such as "
                "attn.*.z and resid_post.3"
            )
    return list(sites)


def per_unit(site: Site, product: Tensor) -> Float[Tensor, "row pos unit"]:
    """Sum an elementwise product over a unit's own width."""
    if site.kind in HEAD_SITES:
        return product.sum(-1)
    return product if site.kind == "mlp.post" else product.sum(-1, keepdim=True)


def at_real_tokens(
    values: Float[Tensor, "row pos unit"], batch: TokenBatch
) -> Float[Tensor, "row pos unit"]:
    """Put zero at padding, whatever is there (padding may hold NaN)."""
    mask = batch.attention_mask.to(values.device)
    return torch.where(mask[..., None], values, torch.zeros((), dtype=values.dtype).to(values))


@dataclass(frozen=True, eq=False)
class NodeScores:
    """Predicted (or exact) effects of nodes on the metric.

    Attributes:
        method: how they were found.
        contrast: what was asked.
        values: by site [row, pos, unit], in units of the metric; padding is zero.
        errors: by site, an estimate of the error of `values`, where the method has one.
        notes: what else the method found out, by name.
    """

    method: str
    contrast: Contrast
    values: dict[Site, Float[Tensor, "row pos unit"]]
    errors: dict[Site, Float[Tensor, "row pos unit"]] | None = None
    notes: dict[str, object] = field(default_factory=lambda: {})

    def nodes(self, *, positions: bool = False) -> list[Node]:
        """Return every node scored, per position or over all of them."""
        found: list[Node] = []
        for site, values in self.values.items():
            for unit in range(values.shape[2]):
                node = Node(site, unit if site.kind in UNIT_SITES else None)
                if positions:
                    count = max(self.contrast.base.lengths)
                    found += [replace(node, position=position) for position in range(count)]
                else:
                    found.append(node)
        return found

    def of(self, node: Node) -> Float[Tensor, " row"]:
        """Return one node's score for every pair; zero where a shorter prompt ends before it."""
        return self._select(self.values[node.site], node)

    def error_of(self, node: Node) -> Float[Tensor, " row"] | None:
        """Return the estimated error of one node's score, where the method estimates one."""
        if self.errors is None:
            return None
        return self._select(self.errors[node.site], node)

    def mean(self, node: Node) -> float:
        """Return one node's score over all pairs."""
        return float(self.of(node).mean())

    def ranked(self, *, positions: bool = False, limit: int | None = None) -> list[Node]:
        """Return nodes by falling size of their mean score."""
        nodes = self.nodes(positions=positions)
        sizes = torch.stack([self.of(node).mean().abs() for node in nodes])
        order = torch.argsort(sizes, descending=True, stable=True).tolist()
        return [nodes[index] for index in order[:limit]]

    def table(self, *, positions: bool = False) -> pl.DataFrame:
        """Return one row per node: site, layer, unit, position, mean and spread over the pairs."""
        rows: list[dict[str, object]] = []
        for node in self.nodes(positions=positions):
            scores, error = self.of(node).double(), self.error_of(node)
            rows.append(
                {
                    "node": str(node),
                    "kind": node.site.kind,
                    "layer": node.site.layer,
                    "unit": node.unit,
                    "position": node.position,
                    "score": float(scores.mean()),
                    "score_abs": float(scores.abs().mean()),
                    "score_sd": float(scores.std(correction=0)),
                    "error": None if error is None else float(error.double().abs().mean()),
                }
            )
        return pl.DataFrame(rows, schema=SCORE_SCHEMA)

    def _select(self, values: Tensor, node: Node) -> Float[Tensor, " row"]:
        chosen = values[..., node.unit or 0]
        if node.position is None:
            return chosen.sum(1)
        batch = self.contrast.base
        picked = [
            chosen[row, batch.column(row, node.position)]
            if -length <= node.position < length
            else chosen.new_zeros(())
            for row, length in enumerate(batch.lengths)
        ]
        return torch.stack(picked)


SCORE_SCHEMA = {
    "node": pl.String,
    "kind": pl.String,
    "layer": pl.Int64,
    "unit": pl.Int64,
    "position": pl.Int64,
    "score": pl.Float64,
    "score_abs": pl.Float64,
    "score_sd": pl.Float64,
    "error": pl.Float64,
}


def by_layer(sites: Iterable[Site]) -> dict[int, list[Site]]:
    """Group sites by the block they lie in."""
    grouped: dict[int, list[Site]] = {}
    for site in sites:
        grouped.setdefault(site.layer or 0, []).append(site)
    return dict(sorted(grouped.items()))
