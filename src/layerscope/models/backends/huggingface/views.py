"""How a site's value is read from, and written back into, the tensor that a module carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerscope.errors import ModelError


@dataclass(frozen=True, eq=False)
class Carried:
    """A tensor that a module reads or gives, in a run.

    Attributes:
        value: the tensor.
        source: what the module read, where `value` is what it gave.
        n_rows: batch rows of the run.
    """

    value: Tensor
    source: Tensor | None
    n_rows: int


class View(Protocol):
    """A site as a part of what a module carries."""

    def read(self, carried: Carried) -> Tensor:
        """Return the site's value; it may share memory with the carried tensor."""
        ...

    def write(self, carried: Carried, value: Tensor) -> Tensor:
        """Return a carried tensor that holds another value of the site; the old one is kept."""
        ...


@dataclass(frozen=True)
class Whole:
    """The whole tensor, times `scale`; batch and position axes that are one come apart."""

    scale: float = 1.0

    def read(self, carried: Carried) -> Shaped[Tensor, "batch pos width"]:
        """Return the tensor."""
        value = _apart(carried)
        return value if self.scale == 1.0 else value * self.scale

    def write(self, carried: Carried, value: Tensor) -> Tensor:
        """Return the value, its axes as they were."""
        if self.scale != 1.0:
            # Dividing what was multiplied does not give it back to the last bit.
            before = _apart(carried)
            exact = torch.where(value == before * self.scale, before, value / self.scale).detach()
            divided = value / self.scale
            value = exact + (divided - divided.detach()) if value.requires_grad else exact
        return _joined(carried, value)


@dataclass(frozen=True)
class Stream:
    """One of several residual streams that lie side by side along an axis."""

    axis: int
    index: int

    def read(self, carried: Carried) -> Float[Tensor, "batch pos d_model"]:
        """Return the stream."""
        return carried.value.select(self.axis, self.index)

    def write(self, carried: Carried, value: Tensor) -> Tensor:
        """Return all streams."""
        whole = carried.value.clone()
        whole.select(self.axis, self.index).copy_(value)
        return whole


@dataclass(frozen=True)
class Heads:
    """Heads side by side in the last axis, [batch, pos, head * d]; all of them, or one."""

    n_heads: int
    head: int | None = None

    def read(self, carried: Carried) -> Float[Tensor, "batch pos *head d"]:
        """Return [batch, pos, head, d], or [batch, pos, d] of one head."""
        heads = carried.value.unflatten(-1, (self.n_heads, -1))
        return heads if self.head is None else heads[..., self.head, :]

    def write(self, carried: Carried, value: Tensor) -> Float[Tensor, "batch pos width"]:
        """Return [batch, pos, head * d]."""
        if self.head is None:
            return value.flatten(-2)
        whole = carried.value.clone(memory_format=torch.contiguous_format)
        whole.unflatten(-1, (self.n_heads, -1))[..., self.head, :] = value
        return whole


@dataclass(frozen=True)
class KernelHeads:
    """What an attention kernel reads, [batch, head, pos, d]; all heads, or one."""

    head: int | None = None

    def read(self, carried: Carried) -> Float[Tensor, "batch pos *head d"]:
        """Return [batch, pos, head, d], or [batch, pos, d] of one head."""
        if self.head is None:
            return carried.value.transpose(1, 2)
        return carried.value[:, self.head]

    def write(self, carried: Carried, value: Tensor) -> Float[Tensor, "batch head pos d"]:
        """Return [batch, head, pos, d]."""
        if self.head is None:
            return value.transpose(1, 2)
        whole = carried.value.clone()
        whole[:, self.head] = value
        return whole


@dataclass(frozen=True)
class Weights:
    """Attention scores or patterns, [batch, head, query, key]; all heads, or one."""

    head: int | None = None

    def read(self, carried: Carried) -> Float[Tensor, "batch *head query key"]:
        """Return the scores or the pattern."""
        return carried.value if self.head is None else carried.value[:, self.head]

    def write(self, carried: Carried, value: Tensor) -> Float[Tensor, "batch head query key"]:
        """Return all heads."""
        if self.head is None:
            return value
        whole = carried.value.clone()
        whole[:, self.head] = value
        return whole


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of the last axis, as fused projections have them."""

    index: int
    count: int

    def read(self, carried: Carried) -> Float[Tensor, "batch pos width"]:
        """Return the part."""
        return _apart(carried).chunk(self.count, dim=-1)[self.index]

    def write(self, carried: Carried, value: Tensor) -> Tensor:
        """Return all parts."""
        whole = _apart(carried).clone(memory_format=torch.contiguous_format)
        whole.chunk(self.count, dim=-1)[self.index].copy_(value)
        return _joined(carried, whole)


@dataclass(frozen=True)
class FusedHeads:
    """Queries, keys or values of all heads in the output of one projection that gives all three.

    Attributes:
        groups: equal parts of the last axis, each with its own queries, keys and values.
        start: where those wanted begin in a group.
        n_heads: how many heads there are of them in a group.
        width: numbers of a head.
    """

    groups: int
    start: int
    n_heads: int
    width: int

    def read(self, carried: Carried) -> Float[Tensor, "batch pos head d"]:
        """Return the heads."""
        return self._in(carried.value).flatten(-3, -2)

    def write(self, carried: Carried, value: Tensor) -> Float[Tensor, "batch pos width"]:
        """Return the whole output."""
        whole = carried.value.clone(memory_format=torch.contiguous_format)
        self._in(whole).copy_(value.unflatten(-2, (self.groups, self.n_heads)))
        return whole

    def _in(self, whole: Tensor) -> Float[Tensor, "batch pos group head d"]:
        span = slice(self.start, self.start + self.n_heads * self.width)
        in_groups = whole.unflatten(-1, (self.groups, -1))
        return in_groups[..., span].unflatten(-1, (self.n_heads, self.width))


@dataclass(frozen=True)
class Chosen:
    """The experts with the largest logits, by falling logit: [batch, pos, count]."""

    count: int

    def read(self, carried: Carried) -> Int[Tensor, "batch pos count"]:
        """Return the numbers of the experts."""
        return _apart(carried).topk(self.count, dim=-1).indices

    def write(self, carried: Carried, value: Tensor) -> Tensor:
        """Raise: the choice is made inside the router."""
        raise ModelError("the experts that a router chose cannot be edited; edit what it reads")


@dataclass(frozen=True, eq=False)
class HeadOut:
    """What one head adds to the output of attention's output projection, its bias left out."""

    projection: nn.Module
    n_heads: int
    head: int

    def read(self, carried: Carried) -> Float[Tensor, "batch pos d_model"]:
        """Return z of the head times its rows of the output matrix."""
        source = carried.source
        assert source is not None
        width = source.shape[-1] // self.n_heads
        span = slice(self.head * width, (self.head + 1) * width)
        weight: Any = self.projection.weight
        if isinstance(self.projection, nn.Linear) and _plain(weight):
            return source[..., span] @ weight[:, span].T
        if isinstance(self.projection, Conv1D) and _plain(weight):
            return source[..., span] @ weight[span]
        # Quantised weights: the projection itself knows them.
        alone = torch.zeros_like(source)
        alone[..., span] = source[..., span]
        given: Tensor = self.projection.forward(alone)
        bias = getattr(self.projection, "bias", None)
        return given if bias is None else given - bias

    def write(self, carried: Carried, value: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """Return the projection's output with this head's share exchanged."""
        return carried.value + (value - self.read(carried))


def _apart(carried: Carried) -> Shaped[Tensor, "batch pos width"]:
    value = carried.value
    return value.unflatten(0, (carried.n_rows, -1)) if value.ndim == 2 else value


def _joined(carried: Carried, value: Tensor) -> Tensor:
    return value.flatten(0, 1) if carried.value.ndim == 2 else value


def _plain(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1


def first_tensor(value: object, item: int = 0) -> Tensor:
    """Return the tensor that a module gave: the output itself, or an item of a tuple.

    Raises:
        ModelError: there is no tensor there.
    """
    found = value[item] if isinstance(value, tuple) else value
    if not isinstance(found, Tensor):
        raise ModelError("a module of this model does not give the tensor that a site names")
    return found
