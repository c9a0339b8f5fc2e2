"""Where the sites inside attention and MLP live, and why some do not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from layerscope.models.backends.base import ModelInfo
from layerscope.models.backends.huggingface.hooks import Carrier, Point
from layerscope.models.backends.huggingface.kernel import KernelShape, has_kernel
from layerscope.models.backends.huggingface.structure import Block, Named, Structure
from layerscope.models.backends.huggingface.views import (
    Carried,
    Chosen,
    FusedHeads,
    HeadOut,
    Heads,
    KernelHeads,
    Part,
    View,
    Weights,
    Whole,
)
from layerscope.models.identities import relative_error
from layerscope.models.sites import Site

_KERNEL_SIDES: dict[str, Literal["query", "key", "value"]] = {
    "attn.q": "query",
    "attn.k": "key",
    "attn.v": "value",
}
_PARTS = {"q_pre": "q", "k_pre": "k", "v": "v"}


class InnerPoints:
    """The sites inside the sublayers of one model.

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
        self._row = structure.row
        self._info = info
        self._probe = probe

    def find(self, site: Site, block: Block) -> Point | str:
        """Return where a site lives, or why it does not exist."""
        group, _, leaf = site.kind.partition(".")
        if group == "mlp":
            return self._find_in_mlp(site, block, leaf)
        kind = type(block.attention.module).__name__
        shape = self.shape(block)
        if shape is None:
            return (
                f"does not exist: block {site.layer} has no attention but a {kind}; attn_in and "
                "attn_out, what it reads and gives, are available"
            )
        if site.head is not None and site.head >= shape.n_heads:
            return f"does not exist: block {site.layer} has {shape.n_heads} heads"
        if leaf in ("z", "out"):
            return self._find_output(site, block, shape)
        if leaf in ("q_pre", "k_pre"):
            return self._find_projected(site, block, shape)
        if shape.calls > 1:
            return (
                f"is not available: {kind} calls its attention kernel {shape.calls} times a pass; "
                "attn_in, attn_out, z and out are"
            )
        kernel = block.attention.module in self._kernels
        if leaf in ("scores", "pattern"):
            if kernel:
                return Point(Carrier(block.attention.module, leaf), Weights(site.head))
            if leaf == "pattern" and block.inner.pattern is not None:
                return _output(block.inner.pattern, Weights(site.head))
        elif not (head := _head_of(site, shape)) or isinstance(head, str):
            return head or ""
        elif kernel:
            side = _KERNEL_SIDES[site.kind]
            return Point(Carrier(block.attention.module, side), KernelHeads(head[0]))
        elif leaf == "v" and block.inner.pattern is not None and head[0] is None:
            return self._find_projected(site, block, shape)
        return (
            f"is not available: {kind} has attention code of its own, which shows no {leaf}; "
            "attn_in, attn_out, z and out are"
        )

    def shape(self, block: Block) -> KernelShape | None:
        """Return the heads of a block's attention; None where it has none."""
        attention = block.attention.module
        known = self._kernels.get(attention)
        if known is not None or not block.attends or has_kernel(attention):
            return known
        n_heads = self._info.n_heads
        width = (_width(block.inner.out, "in") or 0) // n_heads
        return KernelShape(n_heads, self._info.n_kv_heads, width, width, 0.0)

    def checks(
        self, layer: int, block: Block, values: Mapping[Site, Tensor]
    ) -> Iterator[tuple[str, float]]:
        """Yield (identity, error) for the insides of one block."""
        shape = self.shape(block)
        if block.attention.module in self._kernels:
            if shape is not None and shape.calls == 1:
                yield "pattern", shape.error
        elif shape is not None and Site("attn.v", layer) in values:
            yield "pattern", _mixing_error(layer, values, shape)
        if shape is not None and Site("attn.out", layer) in values:
            yield "head_sum", self._head_sum_error(layer, block, values, shape)
        error = _neuron_error(layer, block, values)
        if error is not None:
            yield "neurons", error

    def head_shape(self, site: Site, block: Block, n_keys: int) -> tuple[int, int]:
        """Return (heads, width) of a value of all heads."""
        shape = self.shape(block)
        assert shape is not None
        if site.kind == "attn.z":
            return shape.n_heads, (_width(block.inner.out, "in") or 0) // shape.n_heads
        if site.kind in ("attn.scores", "attn.pattern"):
            return shape.n_heads, n_keys
        shared = site.kind in ("attn.k", "attn.v", "attn.k_pre")
        width = shape.d_value if site.kind == "attn.v" else shape.d_key
        return shape.n_kv_heads if shared else shape.n_heads, width

    def mlp_width(self, site: Site, block: Block) -> int:
        """Return the width of a value inside the MLP."""
        inner = block.inner
        if site.kind == "mlp.experts":
            return _n_chosen(block) or 0
        if site.kind == "mlp.router":
            assert inner.router is not None
            weights = (part for part in inner.router.module.parameters() if part.ndim == 2)
            return next((len(weight) for weight in weights), 0)
        assert inner.post is not None
        # A norm between the neurons and their projection has a weight of one axis.
        return _width(inner.post, "in") or len(inner.post.module.get_parameter("weight"))

    def why_not_edit(self, site: Site, block: Block) -> str | None:
        """Return None when an existing site can be edited, else why not."""
        if site.kind == "mlp.experts" or (
            site.kind == "mlp.router" and block.inner.experts is None
        ):
            return (
                f"'{site}' can be captured, not edited: the router chooses experts before it gives "
                "this; edit mlp_in, or the router's weights"
            )
        if site.kind in ("attn.k", "attn.v") and site.head is not None:
            shape = self.shape(block)
            assert shape is not None
            if shape.n_kv_heads < shape.n_heads:
                leaf = site.kind.partition(".")[2]
                group = site.head * shape.n_kv_heads // shape.n_heads
                return (
                    f"'{site}' can be captured, not edited: several query heads share it; edit "
                    f"attn.{site.layer}.kv_head.{group}.{leaf}"
                )
        return None

    @cached_property
    def _kernels(self) -> dict[nn.Module, KernelShape]:
        if any(has_kernel(block.attention.module) for block in self._structure.blocks):
            return self._probe()
        return {}

    def _find_projected(self, site: Site, block: Block, shape: KernelShape) -> Point | str:
        """Return where a projection gives queries, keys or values."""
        leaf = site.kind.partition(".")[2]
        part = _PARTS[leaf]
        inner = block.inner
        projection = {"q": inner.query, "k": inner.key, "v": inner.value}[part]
        n_heads = shape.n_heads if part == "q" else shape.n_kv_heads
        width = shape.d_value if part == "v" else shape.d_key
        if projection is not None and _width(projection, "out") == n_heads * width:
            return self._with_copy(site, projection, Heads(n_heads))
        if inner.qkv is not None:
            groups = self._row.qkv_groups
            groups = shape.n_kv_heads if isinstance(groups, str) else groups
            counts = dict.fromkeys("kv", shape.n_kv_heads // groups)
            counts["q"] = shape.n_heads // groups
            before = self._row.qkv_order.partition(part)[0]
            start = sum(counts[name] for name in before) * width
            total = (shape.n_heads + 2 * shape.n_kv_heads) * width
            if _width(inner.qkv, "out") == total and shape.d_key == shape.d_value:
                return self._with_copy(
                    site, inner.qkv, FusedHeads(groups, start, counts[part], width)
                )
        what = {"q": "queries", "k": "keys", "v": "values"}[part]
        return (
            f"is not available: no projection of this family gives the {what} of all heads; use "
            f"attn.{site.layer}.{part}, what attention reads"
        )

    def _with_copy(self, site: Site, part: Named, view: View) -> Point:
        copied = site.kind in self._row.overwritten
        return Point(Carrier(part.module, "output", copied=copied), view)

    def _find_output(self, site: Site, block: Block, shape: KernelShape) -> Point | str:
        projection = block.inner.out
        n_heads = shape.n_heads
        width = _width(projection, "in")
        if projection is None or width is None or width % n_heads:
            return (
                f"is not available: {type(block.attention.module).__name__} has no output "
                "projection that layerscope recognises; attn_out is"
            )
        if site.kind == "attn.z":
            return Point(Carrier(projection.module, "input"), Heads(n_heads, site.head))
        if site.head is None:
            return _output(projection)
        return _output(projection, HeadOut(projection.module, n_heads, site.head))

    def _find_in_mlp(self, site: Site, block: Block, leaf: str) -> Point | str:
        inner = block.inner
        if leaf in ("router", "experts"):
            return self._find_choice(block, leaf)
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
            return Point(Carrier(part.module, "input"))
        if inner.up is inner.pre:
            return _output(part, Part(index=int(leaf == "up"), count=2))
        return _output(part)

    def _find_choice(self, block: Block, leaf: str) -> Point | str:
        router, experts = block.inner.router, block.inner.experts
        if router is None:
            return "does not exist: this MLP is no mixture of experts; use mlp.L.post"
        logits, chosen = self._row.router_items
        if leaf == "router":
            if logits is None:
                return "is not available: layerscope does not know what this router gives"
            return Point(Carrier(router.module, "output", logits))
        if chosen is not None:
            return Point(Carrier(router.module, "output", chosen))
        if experts is not None:
            return Point(Carrier(experts.module, "input", 1))
        count = _n_chosen(block)
        if not self._row.largest or logits is None or count is None:
            return "is not available: layerscope does not know how this router chooses"
        return Point(Carrier(router.module, "output", logits), Chosen(count))

    def _head_sum_error(
        self, layer: int, block: Block, values: Mapping[Site, Tensor], shape: KernelShape
    ) -> float:
        projection = block.inner.out
        assert projection is not None
        whole = values[Site("attn.out", layer)]
        z = values[Site("attn.z", layer)].flatten(-2)
        total = torch.zeros_like(whole)
        for head in range(shape.n_heads):
            view = HeadOut(projection.module, shape.n_heads, head)
            total += view.read(Carried(whole, z, len(z)))
        bias = getattr(projection.module, "bias", None)
        return relative_error(total if bias is None else total + bias, whole)


def _head_of(site: Site, shape: KernelShape) -> tuple[int | None] | str:
    """Return the head of queries, keys or values that a site names, or why there is none."""
    leaf = site.kind.partition(".")[2]
    if site.kv_head is not None:
        if shape.n_kv_heads == shape.n_heads:
            return (
                "does not exist: every query head has its own keys and values; use "
                f"attn.{site.layer}.head.{site.kv_head}.{leaf}"
            )
        if site.kv_head >= shape.n_kv_heads:
            return f"does not exist: block {site.layer} has {shape.n_kv_heads} key-value heads"
        return (site.kv_head,)
    if site.head is not None and leaf in ("k", "v"):
        return (site.head * shape.n_kv_heads // shape.n_heads,)
    return (site.head,)


def _mixing_error(layer: int, values: Mapping[Site, Tensor], shape: KernelShape) -> float:
    """Compare the pattern times the values with what the output projection reads."""
    pattern = values[Site("attn.pattern", layer)].float()
    heads = values[Site("attn.v", layer)].transpose(1, 2).float()
    heads = heads.repeat_interleave(shape.n_heads // shape.n_kv_heads, dim=1)
    return relative_error((pattern @ heads).transpose(1, 2), values[Site("attn.z", layer)])


def _neuron_error(layer: int, block: Block, values: Mapping[Site, Tensor]) -> float | None:
    """Compare the neurons with the activation function of what it reads; None without one."""
    function = block.inner.activation
    pre, up, post = (values.get(Site(f"mlp.{leaf}", layer)) for leaf in ("pre", "up", "post"))
    if function is None or pre is None or post is None:
        return None
    expected: Tensor = function.module(pre)
    return relative_error(post, expected if up is None else expected * up)


def _n_chosen(block: Block) -> int | None:
    """Return how many experts a token is sent to."""
    holders = (block.inner.router, block.mlp)
    counts = (getattr(holder.module, "top_k", None) for holder in holders if holder is not None)
    return next((count for count in counts if isinstance(count, int)), None)


def _output(part: Named, view: View | None = None) -> Point:
    return Point(Carrier(part.module, "output"), view or Whole())


def _width(part: Named | None, side: str) -> int | None:
    """Return how many numbers a linear module reads ("in") or gives ("out"), if it says so."""
    if part is None:
        return None
    module = part.module
    for name in ("in_features", "nx") if side == "in" else ("out_features", "nf"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    weight = getattr(module, "weight", None)
    if weight is not None and getattr(weight, "ndim", 0) == 2:
        return int(weight.shape[1 if side == "in" else 0])
    return None
