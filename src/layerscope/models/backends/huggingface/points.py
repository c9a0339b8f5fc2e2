"""Where each site of a Hugging Face model lives, what shape it has, and why some do not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from layerscope.models.backends.base import ModelInfo
from layerscope.models.backends.huggingface.hooks import Carrier, Point
from layerscope.models.backends.huggingface.kernel import KernelShape, has_kernel
from layerscope.models.backends.huggingface.structure import Block, Named, Structure
from layerscope.models.backends.huggingface.views import (
    Carried,
    HeadOut,
    Heads,
    KernelHeads,
    Part,
    Rows,
    View,
    Weights,
    Whole,
)
from layerscope.models.identities import relative_error
from layerscope.models.sites import GLOBAL_KINDS, INNER_KINDS, LAYER_KINDS, Site

_KERNEL_SIDES = {"attn.q": "query", "attn.k": "key", "attn.v": "value"}
_LOGITS = Site("logits")
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


class Points:
    """The sites of one model.

    `probe` runs a short pass and returns what each attention kernel reads; it is called once, when
    a site inside attention is first asked for.
    """

    def __init__(
        self,
        structure: Structure,
        info: ModelInfo,
        probe: Callable[[], dict[nn.Module, KernelShape]],
    ) -> None:
        self._structure = structure
        self._info = info
        self._probe = probe
        self._withdrawn: dict[str, str] = {}

    def sites(self) -> list[Site]:
        """Return every site without the per-head ones, in the order of the forward pass."""
        return [site for site in self._candidates() if self.why_not(site) is None]

    def withdraw(self, kinds: Sequence[str], reason: str) -> None:
        """Refuse sites of these kinds, because of what a check found."""
        self._withdrawn.update(dict.fromkeys(kinds, reason))

    def checks(self, values: Mapping[Site, Tensor]) -> Iterator[tuple[str, float, str]]:
        """Yield (identity, error, where) for what lies inside the sublayers."""
        for layer, block in enumerate(self._structure.blocks):
            where = f"block {layer}"
            shape = self._kernels.get(block.attention.module)
            if shape is not None:
                yield "pattern", shape.error, where
            out = Site("attn.out", layer)
            if out in values and Site("attn.z", layer) in values:
                yield "head_sum", self._head_sum_error(block, layer, values), where
            error = self._neuron_error(block, layer, values)
            if error is not None:
                yield "neurons", error, where

    def __getitem__(self, site: Site) -> Point:
        """Return where an available site lives."""
        point = self._find(site)
        assert isinstance(point, Point), point
        return point

    def why_not(self, site: Site) -> str | None:
        """Return None when the site exists, else one line saying why not."""
        withdrawn = self._withdrawn.get(site.kind)
        if withdrawn is not None:
            return f"'{site}' is refused: {withdrawn}"
        if site == _LOGITS:
            return None
        found = self._find(site)
        return f"'{site}' {found}" if isinstance(found, str) else None

    def why_not_edit(self, site: Site) -> str | None:
        """Return None when an existing site can be edited."""
        if site.kind == "mlp.experts" or (
            site.kind == "mlp.router" and self._router_is_closed(site)
        ):
            return (
                f"'{site}' can be captured, not edited: the router chooses experts before it gives "
                "this; edit mlp_in, or the router's weights"
            )
        grouped = self._info.n_kv_heads < self._info.n_heads
        if site.kind in ("attn.k", "attn.v") and site.head is not None and grouped:
            leaf = site.kind.partition(".")[2]
            shape = self._kernels[self._block(site).attention.module]
            group = site.head * shape.n_kv_heads // shape.n_heads
            return (
                f"'{site}' can be captured, not edited: several query heads share it; edit "
                f"attn.{site.layer}.kv_head.{group}.{leaf}"
            )
        return None

    def trailing(self, site: Site, n_keys: int) -> tuple[int, ...]:
        """Return the axes of a site's value without those of batch and positions."""
        info = self._info
        if site.kind == "logits":
            return (info.d_vocab,)
        group, _, leaf = site.kind.partition(".")
        if not leaf or leaf == "out":
            return (info.d_model,)
        if group == "mlp":
            return (self._mlp_width(site),)
        n_heads, width = self._head_shape(site, n_keys)
        alone = site.head is not None or site.kv_head is not None
        return (width,) if alone else (n_heads, width)

    def _candidates(self) -> Iterator[Site]:
        yield Site("embed")
        for layer in range(len(self._structure.blocks)):
            before, after = LAYER_KINDS[:2], LAYER_KINDS[2:5]
            yield from (Site(kind, layer) for kind in before)
            yield from (Site(kind, layer) for kind in INNER_KINDS if kind.startswith("attn"))
            yield from (Site(kind, layer) for kind in after)
            yield from (Site(kind, layer) for kind in INNER_KINDS if kind.startswith("mlp"))
            yield from (Site(kind, layer) for kind in LAYER_KINDS[5:])
        yield from (Site(kind) for kind in GLOBAL_KINDS[1:])

    def _find(self, site: Site) -> Point | str:
        """Return where a site lives, or why it does not exist."""
        structure = self._structure
        if site.kind == "embed":
            return _output(structure.embedding)
        if site.kind == "final_norm":
            return _output(structure.final_norm)
        block = self._block(site)
        if site.kind.startswith("attn."):
            return self._find_in_attention(site, block)
        if site.kind.startswith("mlp."):
            return self._find_in_mlp(site, block)
        scale = structure.branch_scale
        if site.kind == "resid_mid":
            if structure.parallel:
                return (
                    f"does not exist in {self._info.family}: attention and MLP of a block read the "
                    "same residual in parallel; use resid_pre, attn_out, mlp_out or resid_post"
                )
            reader = block.mlp_norm or block.mlp
            return Point(Carrier(reader.module, "input", shared=True))
        return {
            "resid_pre": _input(block.whole),
            "attn_in": _input(block.attention),
            "attn_out": _output(block.attention_out, Whole(scale)),
            "mlp_in": _input(block.mlp),
            "mlp_out": _output(block.mlp_out, Whole(scale)),
            "resid_post": _output(block.whole),
        }[site.kind]

    def _find_in_attention(self, site: Site, block: Block) -> Point | str:
        leaf = site.kind.partition(".")[2]
        inner, attention = block.inner, block.attention.module
        if leaf in ("z", "out"):
            return self._find_output(site, block)
        shape = self._kernels.get(attention)
        if shape is None:
            return (
                f"is not available: {type(attention).__name__} has its own attention code, which "
                f"shows no {leaf}; attn_in, attn_out, z and out are"
            )
        if leaf in ("q_pre", "k_pre"):
            projection = inner.query if leaf == "q_pre" else inner.key
            n_heads = shape.n_heads if leaf == "q_pre" else shape.n_kv_heads
            if projection is None or _width(projection, "out") != n_heads * shape.d_key:
                return (
                    "is not available: this family computes queries and keys in one projection; "
                    f"use attn.{site.layer}.{leaf[0]}, after norms and rotary embedding"
                )
            return _output(projection, Heads(n_heads))
        if leaf in ("scores", "pattern"):
            return Point(Carrier(attention, leaf), Weights(site.head))
        head = site.head
        if site.kv_head is not None:
            if shape.n_kv_heads == shape.n_heads:
                return (
                    "does not exist: every query head has its own keys and values; use "
                    f"attn.{site.layer}.head.{site.kv_head}.{leaf}"
                )
            if site.kv_head >= shape.n_kv_heads:
                return f"does not exist: block {site.layer} has {shape.n_kv_heads} key-value heads"
            head = site.kv_head
        elif head is not None and leaf in ("k", "v"):
            head = head * shape.n_kv_heads // shape.n_heads
        return Point(Carrier(attention, _KERNEL_SIDES[site.kind]), KernelHeads(head))

    def _find_output(self, site: Site, block: Block) -> Point | str:
        projection = block.inner.out
        n_heads = self._n_heads(block)
        width = None if projection is None else _width(projection, "in")
        if projection is None or width is None or width % n_heads:
            return (
                f"is not available: {type(block.attention.module).__name__} has no output "
                "projection that layerscope recognises; attn_out is"
            )
        if site.kind == "attn.z":
            return _input(projection, Heads(n_heads, site.head))
        if site.head is None:
            return _output(projection)
        return _output(projection, HeadOut(projection.module, n_heads, site.head))

    def _find_in_mlp(self, site: Site, block: Block) -> Point | str:
        leaf = site.kind.partition(".")[2]
        inner = block.inner
        if leaf in ("router", "experts"):
            item = inner.router_items[leaf == "experts"]
            if inner.router is None:
                return "does not exist: this MLP is no mixture of experts; use mlp.L.post"
            if item is None:
                return "is not available: this family's router gives its logits alone"
            return Point(Carrier(inner.router.module, "output", item), Rows())
        if inner.router is not None:
            return (
                "is not available: the neurons of a mixture of experts are in its experts; use "
                "mlp_in, mlp_out, or mlp.L.router"
            )
        if leaf == "up" and inner.pre is not None and inner.up is None:
            return "does not exist: this MLP has no gate; use mlp.L.pre"
        part = {"pre": inner.pre, "up": inner.up, "post": inner.post}[leaf]
        if part is None:
            return (
                f"is not available: {type(block.mlp.module).__name__} has no projections that "
                "layerscope recognises; mlp_in and mlp_out are"
            )
        if leaf == "post":
            return _input(part)
        if inner.up is inner.pre:
            return _output(part, Part(index=int(leaf == "up"), count=2))
        return _output(part)

    @cached_property
    def _kernels(self) -> dict[nn.Module, KernelShape]:
        if any(has_kernel(block.attention.module) for block in self._structure.blocks):
            return self._probe()
        return {}

    def _head_sum_error(self, block: Block, layer: int, values: Mapping[Site, Tensor]) -> float:
        projection = block.inner.out
        assert projection is not None
        n_heads = self._n_heads(block)
        whole = values[Site("attn.out", layer)]
        z = values[Site("attn.z", layer)].flatten(-2)
        total = torch.zeros_like(whole)
        for head in range(n_heads):
            total += HeadOut(projection.module, n_heads, head).read(Carried(whole, z, len(z)))
        bias = getattr(projection.module, "bias", None)
        return relative_error(total if bias is None else total + bias, whole)

    def _neuron_error(
        self, block: Block, layer: int, values: Mapping[Site, Tensor]
    ) -> float | None:
        """Compare the neurons with the activation function of what it reads; None without one."""
        mlp = block.mlp.module
        function = next((getattr(mlp, name) for name in _ACTIVATIONS if hasattr(mlp, name)), None)
        pre, up, post = (values.get(Site(f"mlp.{leaf}", layer)) for leaf in ("pre", "up", "post"))
        if not callable(function) or pre is None or post is None:
            return None
        expected: Tensor = function(pre)
        return relative_error(post, expected if up is None else expected * up)

    def _block(self, site: Site) -> Block:
        assert site.layer is not None
        return self._structure.blocks[site.layer]

    def _n_heads(self, block: Block) -> int:
        shape = self._kernels.get(block.attention.module)
        return self._info.n_heads if shape is None else shape.n_heads

    def _head_shape(self, site: Site, n_keys: int) -> tuple[int, int]:
        block = self._block(site)
        n_heads = self._n_heads(block)
        if site.kind == "attn.z":
            projection = block.inner.out
            assert projection is not None
            return n_heads, (_width(projection, "in") or 0) // n_heads
        if site.kind in ("attn.scores", "attn.pattern"):
            return n_heads, n_keys
        shape = self._kernels[block.attention.module]
        if site.kind in ("attn.k", "attn.v", "attn.k_pre"):
            n_heads = shape.n_kv_heads
        return n_heads, shape.d_value if site.kind == "attn.v" else shape.d_key

    def _mlp_width(self, site: Site) -> int:
        inner = self._block(site).inner
        if site.kind in ("mlp.router", "mlp.experts"):
            config_width = inner.router and _width(inner.router, "out")
            return config_width or 0
        assert inner.post is not None
        return _width(inner.post, "in") or 0

    def _router_is_closed(self, site: Site) -> bool:
        inner = self._block(site).inner
        return inner.router_items[1] is not None


def _input(part: Named, view: View | None = None) -> Point:
    return Point(Carrier(part.module, "input"), view or Whole())


def _output(part: Named, view: View | None = None) -> Point:
    return Point(Carrier(part.module, "output"), view or Whole())


def _width(part: Named, side: str) -> int | None:
    """Return how many numbers a linear module reads ("in") or gives ("out"), if it says so."""
    module = part.module
    for name in ("in_features", "nx") if side == "in" else ("out_features", "nf"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    weight = getattr(module, "weight", None)
    if weight is not None and getattr(weight, "ndim", 0) == 2:
        return int(weight.shape[1 if side == "in" else 0])
    return None
