"""Where each site of an mlx-lm model lives, what shape it has, and why some do not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from mlx import nn
from torch import Tensor
from torch.nn import functional

from layerscope.models.backends.base import ModelInfo
from layerscope.models.backends.huggingface.views import (
    Carried,
    Heads,
    KernelHeads,
    Part,
    View,
    Weights,
    Whole,
)
from layerscope.models.backends.mlx.arrays import to_mlx, to_torch
from layerscope.models.backends.mlx.kernel import KernelShape
from layerscope.models.backends.mlx.recorder import Carrier, Point
from layerscope.models.backends.mlx.structure import Block, Named, Structure, linear_shape
from layerscope.models.backends.recording import outside
from layerscope.models.identities import relative_error
from layerscope.models.sites import GLOBAL_KINDS, INNER_KINDS, LAYER_KINDS, Site

LOGITS = Carrier("logits", "output")
"""No module gives the logits as the model does, with every transform of the head."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True, eq=False)
class HeadOut:
    """What one head adds to the output of attention's output projection, its bias left out."""

    projection: nn.Module
    n_heads: int
    head: int

    def read(self, carried: Carried) -> Float[Tensor, "batch pos d_model"]:
        """Return what the projection, quantised or not, makes of the head's z alone."""
        source = carried.source
        assert source is not None
        width = source.shape[-1] // self.n_heads
        span = slice(self.head * width, (self.head + 1) * width)
        alone = torch.zeros_like(source)
        alone[..., span] = source[..., span]
        both = torch.stack([alone, torch.zeros_like(alone)])
        with outside():
            given = to_torch(self.projection(to_mlx(both)))
        return given[0] - given[1]

    def write(self, carried: Carried, value: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """Return the projection's output with this head's share exchanged."""
        return carried.value + (value - self.read(carried))


@dataclass(frozen=True)
class Scaled:
    """The whole array, times a factor that the model applies next."""

    factor: float

    def read(self, carried: Carried) -> Tensor:
        """Return the product, in the array's own dtype."""
        return carried.value * torch.tensor(self.factor, dtype=carried.value.dtype)

    def write(self, carried: Carried, value: Tensor) -> Tensor:
        """Return the quotient; what was not changed stays as it was, to the bit."""
        factor = torch.tensor(self.factor, dtype=carried.value.dtype)
        return torch.where(value == self.read(carried), carried.value, value / factor)


class Points:
    """The sites of one model.

    `probe` runs a short pass and returns what each block's attention kernel reads; it is called
    once, when a site inside attention is first asked for.
    """

    def __init__(
        self,
        structure: Structure,
        info: ModelInfo,
        probe: Callable[[], dict[int, KernelShape]],
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
            shape = self.kernels.get(layer)
            if shape is not None:
                yield "pattern", shape.error, where
            if Site("attn.out", layer) in values and Site("attn.z", layer) in values:
                yield "head_sum", self._head_sum_error(block, layer, values), where
            error = self._neuron_error(layer, values)
            if error is not None:
                yield "neurons", error, where

    def __getitem__(self, site: Site) -> Point:
        """Return where an available site lives."""
        point = Point(LOGITS) if site.kind == "logits" else self._find(site)
        assert isinstance(point, Point), point
        return point

    def why_not(self, site: Site) -> str | None:
        """Return None when the site exists, else one line saying why not."""
        withdrawn = self._withdrawn.get(site.kind)
        if withdrawn is not None:
            return f"'{site}' is refused: {withdrawn}"
        if site.kind == "logits":
            return None
        found = self._find(site)
        return f"'{site}' {found}" if isinstance(found, str) else None

    def why_not_edit(self, site: Site) -> str | None:
        """Return None when an existing site can be edited."""
        grouped = self._info.n_kv_heads < self._info.n_heads
        if site.kind in ("attn.k", "attn.v") and site.head is not None and grouped:
            leaf = site.kind.partition(".")[2]
            shape = self.kernels[self._layer(site)]
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
            # Where it is a field of the configuration, the scale is no part of the embedding.
            part = structure.family.embedding_scale == "sqrt(d_model)"
            return _output(structure.embedding, _scaled(structure.embedding_scale if part else 1.0))
        if site.kind == "final_norm":
            return _output(structure.final_norm)
        block = structure.blocks[self._layer(site)]
        if site.kind.startswith("attn."):
            return self._find_in_attention(site, block)
        if site.kind.startswith("mlp."):
            return self._find_in_mlp(site, block)
        if site.kind == "resid_mid":
            if structure.parallel:
                return (
                    f"does not exist in {self._info.family}: attention and MLP of a block read the "
                    "same residual in parallel; use resid_pre, attn_out, mlp_out or resid_post"
                )
            reader = block.mlp_norm or block.mlp
            return Point(Carrier(reader.name, "input", shared=True))
        return {
            "resid_pre": _input(block.whole),
            "attn_in": _input(block.attention),
            "attn_out": _output(block.attention_out, _scaled(structure.branch_scale)),
            "mlp_in": _input(block.mlp),
            "mlp_out": _output(block.mlp_out, _scaled(structure.branch_scale)),
            "resid_post": _output(block.whole),
        }[site.kind]

    def _find_in_attention(self, site: Site, block: Block) -> Point | str:
        leaf = site.kind.partition(".")[2]
        if leaf in ("z", "out"):
            return self._find_output(site, block)
        shape = self.kernels.get(self._layer(site))
        if shape is None:
            return (
                f"is not available: {type(block.attention.module).__name__} has its own attention "
                f"code, which shows no {leaf}; attn_in, attn_out, z and out are"
            )
        if leaf in ("q_pre", "k_pre"):
            projection = block.query if leaf == "q_pre" else block.key
            if projection is None:
                return (
                    "is not available: this family computes queries and keys in one projection; "
                    f"use attn.{site.layer}.{leaf[0]}, after norms and rotary embedding"
                )
            n_heads = shape.n_heads if leaf == "q_pre" else shape.n_kv_heads
            return _output(projection, Heads(n_heads))
        name = block.attention.name
        if leaf == "scores":
            return Point(Carrier(name, "scores"), Weights(site.head))
        if leaf == "pattern":
            return Point(Carrier(name, "pattern"), Weights(site.head))
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
        if leaf == "q":
            return Point(Carrier(name, "query"), KernelHeads(head))
        return Point(Carrier(name, "key" if leaf == "k" else "value"), KernelHeads(head))

    def _find_output(self, site: Site, block: Block) -> Point | str:
        n_heads = self._info.n_heads
        if block.out is None:
            return (
                f"is not available: {type(block.attention.module).__name__} has no output "
                "projection that layerscope recognises; attn_out is"
            )
        if site.kind == "attn.z":
            return _input(block.out, Heads(n_heads, site.head))
        if site.head is None:
            return _output(block.out)
        return _output(block.out, HeadOut(block.out.module, n_heads, site.head))

    def _find_in_mlp(self, site: Site, block: Block) -> Point | str:
        leaf = site.kind.partition(".")[2]
        if leaf == "router":
            if block.router is None:
                return "does not exist: this MLP is no mixture of experts; use mlp.L.post"
            return _output(block.router)
        if leaf == "experts":
            if block.router is None:
                return "does not exist: this MLP is no mixture of experts; use mlp.L.post"
            return "is not available: mlx-lm names the chosen experts in no order; use mlp.L.router"
        if block.router is not None:
            return (
                "is not available: the neurons of a mixture of experts are in its experts; use "
                "mlp_in, mlp_out, or mlp.L.router"
            )
        if leaf == "up" and block.pre is not None and block.up is None:
            return "does not exist: this MLP has no gate; use mlp.L.pre"
        part = {"pre": block.pre, "up": block.up, "post": block.post}[leaf]
        if part is None:
            return (
                f"is not available: {type(block.mlp.module).__name__} has no projections that "
                "layerscope recognises; mlp_in and mlp_out are"
            )
        if leaf == "post":
            return _input(part)
        if block.up is block.pre:
            return _output(part, Part(index=int(leaf == "up"), count=2))
        return _output(part)

    @cached_property
    def kernels(self) -> dict[int, KernelShape]:
        """What each block's attention kernel reads; a block without one is missing."""
        return self._probe()

    def _head_sum_error(self, block: Block, layer: int, values: Mapping[Site, Tensor]) -> float:
        assert block.out is not None
        n_heads = self._info.n_heads
        whole = values[Site("attn.out", layer)]
        z = values[Site("attn.z", layer)].flatten(-2)
        total = torch.zeros_like(whole)
        for head in range(n_heads):
            view = HeadOut(block.out.module, n_heads, head)
            total += view.read(Carried(whole, z, len(z)))
        bias: Any = block.out.module.get("bias")
        return relative_error(total if bias is None else total + to_torch(bias), whole)

    def _neuron_error(self, layer: int, values: Mapping[Site, Tensor]) -> float | None:
        """Compare the neurons with the activation function of what it reads; None without one."""
        pre, up, post = (values.get(Site(f"mlp.{leaf}", layer)) for leaf in ("pre", "up", "post"))
        function = _ACTIVATIONS.get(self._structure.family.activation or "")
        if function is None or pre is None or post is None:
            return None
        expected = function(pre)
        return relative_error(post, expected if up is None else expected * up)

    def _layer(self, site: Site) -> int:
        assert site.layer is not None
        return site.layer

    def _head_shape(self, site: Site, n_keys: int) -> tuple[int, int]:
        shape = self.kernels[self._layer(site)]
        if site.kind in ("attn.scores", "attn.pattern"):
            return shape.n_heads, n_keys
        grouped = site.kind in ("attn.k", "attn.v", "attn.k_pre")
        n_heads = shape.n_kv_heads if grouped else shape.n_heads
        return n_heads, shape.d_value if site.kind in ("attn.v", "attn.z") else shape.d_key

    def _mlp_width(self, site: Site) -> int:
        block = self._structure.blocks[self._layer(site)]
        part = block.router if site.kind == "mlp.router" else block.post
        assert part is not None
        rows, columns = linear_shape(part.module)
        return rows if site.kind == "mlp.router" else columns


def _scaled(factor: float) -> View:
    return Whole() if factor == 1.0 else Scaled(factor)


def _input(part: Named, view: View | None = None) -> Point:
    return Point(Carrier(part.name, "input"), view or Whole())


def _output(part: Named, view: View | None = None) -> Point:
    return Point(Carrier(part.name, "output"), view or Whole())
