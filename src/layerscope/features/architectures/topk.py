"""Gates that keep the largest: of a token, of a batch, or one of each group."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.architectures.base import Gate, pick


class _Ranked(Gate):
    """Keeps features by rank, so that all of them must be computed.

    Args:
        k: how many are kept.
        weights: [n] what scores are multiplied with before they are ranked (decoder norms, where a
            format ranks by contribution); None for nothing.
    """

    local = False

    def __init__(self, k: int, weights: Float[Tensor, " n"] | None = None) -> None:
        if k < 1:
            raise DictionaryError(f"k is {k}; a dictionary keeps at least one feature per token")
        self.k = k
        self.weights = weights

    def _scores(self, pre: Tensor) -> Tensor:
        return pre if self.weights is None else pre * pick(self.weights, pre, None)

    def _refuse_some(self, ids: Tensor | None) -> None:
        if ids is not None:
            raise DictionaryError("this gate ranks features, so all of them must be computed")

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the weights of the ranking, where there are any."""
        return {} if self.weights is None else {"score_weights": self.weights}

    def scaled(self, units: Float[Tensor, " n"]) -> Gate:
        """Return the gate that ranks the same features in the new units."""
        old = torch.ones_like(units) if self.weights is None else self.weights
        weights = (old.double() / units.double()).float()
        return type(self)(self.k, None if bool((weights == weights[0]).all()) else weights)

    @property
    def _by(self) -> str:
        return "" if self.weights is None else " by weighted value"


class TopK(_Ranked):
    """Keeps the k largest pre-activations of every token, where they are positive."""

    def activate(
        self, pre: Float[Tensor, "*rows n"], ids: Tensor | None = None
    ) -> Float[Tensor, "*rows n"]:
        """Return the k largest of each row, zero elsewhere."""
        self._refuse_some(ids)
        k = min(self.k, pre.shape[-1])
        chosen = self._scores(pre.detach()).topk(k, dim=-1, sorted=False).indices
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(-1, chosen, True)
        return torch.where(kept, pre, torch.zeros_like(pre)).relu()

    def describe(self) -> str:
        """Return the rule."""
        return f"topk k={self.k}{self._by}"


class BatchTopK(_Ranked):
    """Keeps the k * rows largest positive values of a whole batch: a rule of training.

    What a token's features are depends on the other tokens, so a stored threshold is used in its
    place wherever there is one (`JumpRelu`).
    """

    def activate(
        self, pre: Float[Tensor, "*rows n"], ids: Tensor | None = None
    ) -> Float[Tensor, "*rows n"]:
        """Return the k * rows largest values of the batch, zero elsewhere."""
        self._refuse_some(ids)
        n_rows = max(pre.numel() // max(pre.shape[-1], 1), 1)
        scores = self._scores(pre.detach()).relu().flatten()
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.topk(min(self.k * n_rows, scores.numel()), sorted=False).indices] = True
        return torch.where(kept.view_as(pre), pre, torch.zeros_like(pre)).relu()

    def describe(self) -> str:
        """Return the rule."""
        return f"batch topk k={self.k}{self._by} (depends on the batch: no threshold is stored)"


class GroupMax(_Ranked):
    """Splits the features into k groups of equal size and keeps the largest of each."""

    def activate(
        self, pre: Float[Tensor, "*rows n"], ids: Tensor | None = None
    ) -> Float[Tensor, "*rows n"]:
        """Return the largest positive value of each group, zero elsewhere."""
        self._refuse_some(ids)
        n = pre.shape[-1]
        if n % self.k:
            raise DictionaryError(f"{n} features cannot be split into {self.k} groups of one size")
        groups = self._scores(pre.detach()).unflatten(-1, (self.k, n // self.k))
        best = groups.argmax(dim=-1, keepdim=True)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)
        return torch.where(kept, pre, torch.zeros_like(pre)).relu()

    def describe(self) -> str:
        """Return the rule."""
        return f"group max of {self.k} groups{self._by}"
