"""Views of the tensors that TransformerLens' hook points carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.models.backends.huggingface.views import Carried


@dataclass(frozen=True)
class HeadAxis:
    """Heads on an axis of their own, [batch, pos, head, d]; one of them."""

    head: int

    def read(self, carried: Carried) -> Float[Tensor, "batch pos d"]:
        """Return one head."""
        return carried.value[:, :, self.head]

    def write(self, carried: Carried, value: Tensor) -> Float[Tensor, "batch pos head d"]:
        """Return all heads."""
        whole = carried.value.clone()
        whole[:, :, self.head] = value
        return whole


@dataclass(frozen=True)
class NewKeys:
    """The keys of this run's own tokens, the last `n_new` of [batch, pos, head, d]; all or one."""

    n_new: int
    head: int | None = None

    def read(self, carried: Carried) -> Float[Tensor, "batch pos *head d"]:
        """Return the new tokens' keys."""
        new = carried.value[:, -self.n_new :]
        return new if self.head is None else new[:, :, self.head]

    def write(self, carried: Carried, value: Tensor) -> Float[Tensor, "batch all_pos head d"]:
        """Return all keys."""
        whole = carried.value.clone()
        new = whole[:, -self.n_new :]
        (new if self.head is None else new[:, :, self.head]).copy_(value)
        return whole


@dataclass(frozen=True)
class Scores:
    """Attention scores, [batch, head, query, key]; all heads, or one.

    A bridge masks with the least number of the dtype; a masked score is read as minus infinity
    there too, and what was masked keeps its number unless an edit lets it be seen.
    """

    head: int | None = None

    def read(self, carried: Carried) -> Float[Tensor, "batch *head query key"]:
        """Return the scores."""
        shown = carried.value.masked_fill(_masked(carried.value), -torch.inf)
        return shown if self.head is None else shown[:, self.head]

    def write(self, carried: Carried, value: Tensor) -> Float[Tensor, "batch head query key"]:
        """Return all heads."""
        whole = value
        if self.head is not None:
            whole = carried.value.clone()
            whole[:, self.head] = value
        return torch.where(_masked(carried.value) & _masked(whole), carried.value, whole)


@dataclass(frozen=True, eq=False)
class HeadResult:
    """What one head adds to the output of attention's output projection, its bias left out.

    `latest_z` returns what that projection reads in this run, as [batch, pos, head, d].
    """

    head: int
    weight: Float[Tensor, "head d d_model"]
    latest_z: Callable[[], Tensor]

    def read(self, carried: Carried) -> Float[Tensor, "batch pos d_model"]:
        """Return z of the head times its output matrix."""
        return self.latest_z()[:, :, self.head] @ self.weight[self.head]

    def write(self, carried: Carried, value: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """Return the projection's output with this head's share exchanged."""
        return carried.value + (value - self.read(carried))


def _masked(scores: Tensor) -> Tensor:
    return scores <= torch.finfo(scores.dtype).min / 2
