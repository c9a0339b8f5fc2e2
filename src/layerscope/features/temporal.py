"""Temporal dictionaries: what attention over earlier tokens predicts, and what is new.

Attention layers over codes predict part of a token from the tokens before it; a sparse dictionary
encodes the rest. Only these novel codes are features. Source: Lubana et al. (2025),
arXiv 2511.01836.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.matrices import Ids, indices

_EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class CodeAttention:
    """One causal attention layer between codes.

    Attributes:
        n_heads: heads.
        query, key, value, output: (weight [out, n], bias [out]) of the four projections.
    """

    n_heads: int
    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    output: tuple[Tensor, Tensor]

    def __call__(
        self, context: Float[Tensor, "batch pos n"], codes: Float[Tensor, "batch pos n"]
    ) -> Float[Tensor, "batch pos n"]:
        """Return codes predicted from the context of each position."""
        query = self._heads(codes, self.query)
        key, value = self._heads(context, self.key), self._heads(context, self.value)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        weight, bias = self.output
        return F.linear(mixed.transpose(1, 2).flatten(2), weight, bias)

    def _heads(self, values: Tensor, projection: tuple[Tensor, Tensor]) -> Tensor:
        weight, bias = projection
        return F.linear(values, weight, bias).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class TemporalDictionary(SparseDictionary):
    """A dictionary of what is new at each token; it needs whole sequences, [batch, pos, d_in].

    Attributes:
        attention: the layers that predict.
    """

    attention: Sequence[CodeAttention]
    epsilon: float

    @classmethod
    def of(
        cls, plain: SparseDictionary, attention: Sequence[CodeAttention], scale: float
    ) -> TemporalDictionary:
        """Return the temporal dictionary with the folded weights of a plain one."""
        made = cls.__new__(cls)
        made.__dict__.update(plain.__dict__)
        made.attention = tuple(attention)
        made.epsilon = _EPSILON / scale
        return made

    def pre_activations(
        self, x: Float[Tensor, "*batch pos d_in"], ids: Ids | None = None
    ) -> Float[Tensor, "*batch pos n"]:
        """Return pre-activations of what is not predicted; x holds whole sequences."""
        residual, _ = self._predict(x)
        pre = super().pre_activations(residual)
        return pre if ids is None else pre[..., indices(ids, self.n_features, "the dictionary")]

    def decode(
        self,
        features: Float[Tensor, "*batch pos n"],
        *,
        x: Float[Tensor, "*batch pos d_in"] | None = None,
        to: int = 0,
    ) -> Float[Tensor, "*batch pos d_out"]:
        """Return what features write; with x, what was predicted from the context is added."""
        written = super().decode(features, to=to)
        return written if x is None else written + self._predict(x)[1]

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is left of x, and what was predicted of it, in raw units."""
        if x.ndim < 2:
            raise DictionaryError("a temporal dictionary encodes sequences, [batch, pos, d_in]")
        shape = x.shape
        left = self._widened(x).reshape(-1, *shape[-2:])
        predicted = torch.zeros_like(left)
        decoder = self.decoders[0].tensor().to(left.device, left.dtype)
        for layer in self.attention:
            codes = super().pre_activations(left).relu()
            context = torch.cat((torch.zeros_like(codes[:, :1]), codes[:, :-1]), dim=1)
            direction = layer(context, codes).relu() @ decoder
            size = direction.norm(dim=-1, keepdim=True) + self.epsilon
            part = (direction * left).sum(dim=-1, keepdim=True) / size.square() * direction
            predicted, left = predicted + part, left - part
        return left.view(shape), predicted.view(shape)

    def _one_direction(self, what: str) -> None:
        if what == "read":
            raise DictionaryError(
                "features of a temporal dictionary read what the context leaves over, so no single "
                "direction exists; use gradients of pre_activations"
            )


def read_attention(
    tensors: dict[str, Tensor], layer: int, n_heads: int, where: Any
) -> CodeAttention:
    """Return one layer from its eight tensors; raises DictionaryError if one is missing."""
    found: list[tuple[Tensor, Tensor]] = []
    for part in ("q_target", "k_ctx", "v_ctx", "c_proj"):
        name = f"attn_layers.{layer}.{part}"
        if f"{name}.weight" not in tensors:
            raise DictionaryError(f"{where} has no tensor '{name}.weight'")
        weight = tensors[f"{name}.weight"]
        found.append((weight, tensors.get(f"{name}.bias", torch.zeros(len(weight)))))
    return CodeAttention(n_heads, *found)
