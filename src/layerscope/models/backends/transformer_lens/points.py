"""Which sites an object has, what shape they have, and why some do not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from layerscope.models.backends.huggingface.hooks import Carrier, Point
from layerscope.models.backends.huggingface.views import (
    Carried,
    Heads,
    KernelHeads,
    View,
    Weights,
    Whole,
)
from layerscope.models.backends.transformer_lens.structure import HOOKED, LensStructure
from layerscope.models.backends.transformer_lens.views import (
    HeadAxis,
    HeadResult,
    NewKeys,
    Scores,
)
from layerscope.models.identities import relative_error
from layerscope.models.sites import GLOBAL_KINDS, INNER_KINDS, LAYER_KINDS, Site

_LOGITS = Site("logits")
_SHARED_KINDS = ("attn.k", "attn.v")

Probe = Callable[[Mapping[Site, Carrier]], Mapping[Site, Tensor]]
"""Runs a few tokens and returns what the carriers held that the pass reached."""


class Points:
    """The sites of one object: those that a short pass reaches, in the shape they should have."""

    def __init__(self, structure: LensStructure, probe: Probe) -> None:
        self._structure = structure
        self._probe = probe
        self._withdrawn: dict[str, str] = {}

    def sites(self) -> list[Site]:
        """Return every site without the per-head ones, in the order of the forward pass."""
        return [site for site in self._candidates() if self.why_not(site) is None]

    def withdraw(self, kinds: Sequence[str], reason: str) -> None:
        """Refuse sites of these kinds, because of what a check found."""
        self._withdrawn.update(dict.fromkeys(kinds, reason))

    def point(self, site: Site, latest_z: Callable[[int], Tensor], n_new: int | None) -> Point:
        """Return where an available site lives.

        `latest_z` gives z of a layer in this run, `n_new` the width of a run that continues a past.
        """
        carrier = self.carrier(site)
        assert carrier is not None
        if n_new is not None and site.kind == "attn.k" and self.rotates_past_keys:
            return Point(carrier, NewKeys(n_new, self._head_index(site)))
        return Point(carrier, self._view(site, latest_z))

    @property
    def rotates_past_keys(self) -> bool:
        """True where keys are stored before the rotary embedding, and `attn.k` lies after it."""
        structure = self._structure
        carriers = structure.carriers
        return structure.kind == HOOKED and carriers["attn.k"] != carriers["attn.k_pre"]

    def carrier(self, site: Site) -> Carrier | None:
        """Return what carries a site, whether this object reaches it or not."""
        structure = self._structure
        if site.kind == "final_norm":
            return Carrier(structure.unembed, "input")
        carriers = structure.carriers.get(site.kind)
        return None if carriers is None else carriers[site.layer or 0]

    def why_not(self, site: Site) -> str | None:
        """Return None when the site exists, else one line saying why not."""
        withdrawn = self._withdrawn.get(site.kind)
        if withdrawn is not None:
            return f"'{site}' is refused: {withdrawn}"
        if site == _LOGITS:
            return None
        reason = self._missing(site.whole) or self._no_such_head(site)
        return None if reason is None else f"'{site}' {reason}"

    def why_not_edit(self, site: Site) -> str | None:
        """Return None when an existing site can be edited."""
        info = self._structure.info
        if site.kind in _SHARED_KINDS and site.head is not None and info.n_kv_heads < info.n_heads:
            leaf = site.kind.partition(".")[2]
            return (
                f"'{site}' can be captured, not edited: several query heads share it; edit "
                f"attn.{site.layer}.kv_head.{self._group(site.head)}.{leaf}"
            )
        return None

    def trailing(self, site: Site, n_keys: int) -> tuple[int, ...]:
        """Return the axes of a site's value without those of batch and positions."""
        info = self._structure.info
        if site.kind == "logits":
            return (info.d_vocab,)
        alone = site.head is not None or site.kv_head is not None
        if site.kind in ("attn.scores", "attn.pattern"):
            return (n_keys,) if alone else (info.n_heads, n_keys)
        shape = self._shapes[site.whole]
        return shape[1:] if alone and len(shape) > 1 else shape

    def checks(self, values: Mapping[Site, Tensor]) -> Iterator[tuple[str, float, str]]:
        """Yield (identity, error, where) for what lies inside the sublayers."""
        for layer in range(self._structure.info.n_layers):
            where = f"block {layer}"
            attention = {
                leaf: values.get(Site(f"attn.{leaf}", layer))
                for leaf in ("v", "pattern", "z", "out")
            }
            v, pattern, z, out = attention.values()
            if v is not None and pattern is not None and z is not None:
                groups = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
                mixed = (pattern @ groups.transpose(1, 2)).transpose(1, 2)
                yield "pattern", relative_error(mixed, z), where
            if z is not None and out is not None:
                yield from self._head_sum(layer, z, out)
            yield from self._neurons(layer, values)

    def _head_sum(self, layer: int, z: Tensor, out: Tensor) -> Iterator[tuple[str, float, str]]:
        weight, bias = self._structure.out_weight(layer), self._structure.out_bias(layer)
        if weight is not None:
            total = torch.einsum("bphd,hdm->bpm", z, weight.to(z.dtype))
            error = relative_error(total if bias is None else total + bias, out)
            yield "head_sum", error, f"block {layer}"

    def _neurons(
        self, layer: int, values: Mapping[Site, Tensor]
    ) -> Iterator[tuple[str, float, str]]:
        function, offset = self._structure.activation(layer)
        pre, up, post = (values.get(Site(f"mlp.{leaf}", layer)) for leaf in ("pre", "up", "post"))
        if function is not None and pre is not None and post is not None:
            expected = function(pre) if up is None else function(pre) * up
            error = relative_error(post, expected if offset is None else expected + offset)
            yield "neurons", error, f"block {layer}"

    def _candidates(self) -> Iterator[Site]:
        yield Site("embed")
        for layer in range(self._structure.info.n_layers):
            yield from (Site(kind, layer) for kind in LAYER_KINDS[:2])
            yield from (Site(kind, layer) for kind in INNER_KINDS if kind.startswith("attn"))
            yield from (Site(kind, layer) for kind in LAYER_KINDS[2:5])
            yield from (Site(kind, layer) for kind in INNER_KINDS if kind.startswith("mlp"))
            yield from (Site(kind, layer) for kind in LAYER_KINDS[5:])
        yield from (Site(kind) for kind in GLOBAL_KINDS[1:])

    @cached_property
    def _shapes(self) -> dict[Site, tuple[int, ...]]:
        """Trailing axes of every site that a short pass reaches, as they came out."""
        carriers = {site: self.carrier(site) for site in self._candidates() if site != _LOGITS}
        known = {site: carrier for site, carrier in carriers.items() if carrier is not None}
        shapes: dict[Site, tuple[int, ...]] = {}
        for site, value in self._probe(known).items():
            try:
                shown = self._view(site, None).read(Carried(value, None, len(value)))
            except RuntimeError:  # heads that do not fit into the tensor
                continue
            shape = list(shown.shape)
            del shape[site.pos_axis], shape[0]
            shapes[site] = tuple(shape)
        return shapes

    def _missing(self, site: Site) -> str | None:
        structure = self._structure
        if self.carrier(site) is None or site not in self._shapes:
            if site.kind == "resid_mid":
                return (
                    f"does not exist in {structure.info.family}: attention and MLP of a block read "
                    "the same residual in parallel; use resid_pre, attn_out, mlp_out or resid_post"
                )
            if site.kind == "mlp.up":
                return "does not exist: this MLP has no gate; use mlp.L.pre"
            return (
                f"is not available: this {structure.kind} has no hook point that its forward pass "
                "reaches there"
            )
        expected = self._expected_shape(site)
        found = self._shapes[site]
        if expected is not None and found != expected:
            return (
                f"is not available: this {structure.kind} holds {list(found)} there, not "
                f"{list(expected)}"
            )
        return None

    def _expected_shape(self, site: Site) -> tuple[int, ...] | None:
        info = self._structure.info
        if site.kind.startswith("mlp."):
            return None
        if not site.kind.startswith("attn.") or site.kind == "attn.out":
            return (info.d_model,)
        if site.kind in ("attn.scores", "attn.pattern"):
            return None
        width = self._shapes[site][-1]
        shared = site.kind in (*_SHARED_KINDS, "attn.k_pre")
        return (info.n_kv_heads if shared else info.n_heads, width)

    def _no_such_head(self, site: Site) -> str | None:
        info = self._structure.info
        leaf = site.kind.partition(".")[2]
        if site.kv_head is not None and info.n_kv_heads == info.n_heads:
            return (
                "does not exist: every query head has its own keys and values; use "
                f"attn.{site.layer}.head.{site.kv_head}.{leaf}"
            )
        if site.kind == "attn.out" and site.head is not None:
            if self._structure.out_weight(site.layer or 0) is None:
                return "is not available: the output projection's weights are packed; use z"
            return self._missing(Site("attn.z", site.layer))
        return None

    def _view(self, site: Site, latest_z: Callable[[int], Tensor] | None) -> View:
        head = self._head_index(site)
        if site.kind == "attn.out" and head is not None:
            layer = site.layer or 0
            weight = self._structure.out_weight(layer)
            assert latest_z is not None and weight is not None
            return HeadResult(head, weight, lambda: latest_z(layer))
        layout = self._structure.layouts.get(site.kind, "plain")
        if layout == "scores":
            return Scores(head)
        if layout == "pattern":
            return Weights(head)
        if layout == "kernel heads":
            return KernelHeads(head)
        if layout == "flat heads":
            info = self._structure.info
            shared = site.kind in (*_SHARED_KINDS, "attn.k_pre")
            return Heads(info.n_kv_heads if shared else info.n_heads, head)
        return Whole() if head is None else HeadAxis(head)

    def _head_index(self, site: Site) -> int | None:
        if site.head is not None and site.kind in _SHARED_KINDS:
            return self._group(site.head)
        return site.head if site.kv_head is None else site.kv_head

    def _group(self, head: int) -> int:
        info = self._structure.info
        return head * info.n_kv_heads // info.n_heads
