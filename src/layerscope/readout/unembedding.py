"""The unembedding of a model: how a hidden vector becomes logits."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError


@dataclass(frozen=True)
class Unembedding:
    """A reference to a model's output head; nothing is copied.

    Logits are ``z = hidden @ weight.T + bias``, then ``z * scale``, then
    ``softcap * tanh(z / softcap)``, all accumulated in float32.

    Attributes:
        weight: [vocab, d_model] as the model stores it (any float dtype, tied or not).
        bias: [vocab] or None.
        scale: factor on the logits (Cohere's ``logit_scale``; Granite's divisor enters inverted).
        softcap: Gemma 2's final cap in logits, or None.
    """

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ConfigError(
                f"unembedding weight has shape {tuple(self.weight.shape)}; pass [vocab, d_model]"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ConfigError(
                f"unembedding bias has shape {tuple(self.bias.shape)} for a vocabulary of "
                f"{self.d_vocab}; pass [vocab] or None"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ConfigError(f"softcap is {self.softcap}; pass a positive number or None")

    @property
    def d_vocab(self) -> int:
        """Width of the softmax."""
        return self.weight.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the hidden vectors."""
        return self.weight.shape[1]

    def transform(
        self, product: Float[Tensor, "*row vocab"], *, unit: float = 1.0
    ) -> Float[Tensor, "*row vocab"]:
        """Turn bare products ``hidden @ weight.T`` into logits, in place, and return them.

        Args:
            product: float32 products for the whole vocabulary, times `unit`.
            unit: the logits come out times `unit` as well (log2 e for logits in bits).
        """
        return self.cap(self.shift(product, unit=unit), unit=unit)

    def shift(
        self, product: Float[Tensor, "*row vocab"], *, unit: float = 1.0
    ) -> Float[Tensor, "*row vocab"]:
        """Apply bias and scale, but not the cap, in place; arguments as for `transform`."""
        if self.bias is not None:
            product.add_(self.bias.detach().float(), alpha=unit)
        if self.scale != 1.0:
            product.mul_(self.scale)
        return product

    def cap(self, z: Float[Tensor, "*any"], *, unit: float = 1.0) -> Float[Tensor, "*any"]:
        """Apply the softcap, in place.

        It keeps the order of logits, but rounds those far above the cap to one and the same
        number; whatever is ranked has to be ranked before.
        """
        if self.softcap is not None:
            cap = self.softcap * unit
            z.div_(cap).tanh_().mul_(cap)
        return z

    def logits(self, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
        """Return float32 logits of a few rows, with all transforms (the slow, obvious path)."""
        self.check(hidden)
        product = hidden.detach().float() @ self.weight.detach().float().T
        return self.transform(product)

    def check(self, hidden: Float[Tensor, "row d_model"]) -> None:
        """Raise ConfigError when `hidden` is not [row, d_model] of this unembedding's width."""
        if hidden.ndim != 2 or hidden.shape[1] != self.d_model:
            raise ConfigError(
                f"hidden has shape {tuple(hidden.shape)}; this unembedding needs "
                f"[row, {self.d_model}]"
            )


def untransformed(unembedding: Unembedding) -> bool:
    """Return True when the logits are the bare products: no bias, scale or softcap."""
    return unembedding.bias is None and unembedding.scale == 1.0 and unembedding.softcap is None
