"""One call of the readout: its parts, checked against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.readout.request import (
    Reference,
    Request,
    TokenSets,
    check_reference,
    check_sets,
    check_tokens,
)
from layerscope.readout.unembedding import Unembedding

BITS = math.log2(math.e)  # bits per nat: the passes work on logits in bits


@dataclass(frozen=True)
class Job:
    """What `readout` was called with."""

    hidden: Float[Tensor, "row d_model"]
    unembedding: Unembedding
    request: Request
    reference: Reference | None
    against: Float[Tensor, "row d_model"] | None
    tokens: Int[Tensor, "row n_tok"] | None
    sets: TokenSets | None

    def check(self) -> None:
        """Raise ConfigError where the parts do not fit each other."""
        self.unembedding.check(self.hidden)
        rows, d_vocab = self.n_rows, self.unembedding.d_vocab
        if rows == 0:
            raise ConfigError("readout needs at least one row; hidden is empty")
        if self.reference is not None:
            check_reference(
                self.reference, rows=rows, d_model=self.unembedding.d_model, d_vocab=d_vocab
            )
        if self.against is not None and self.against.shape != self.hidden.shape:
            raise ConfigError(
                f"against has shape {tuple(self.against.shape)}; pass the rows of the other lens, "
                f"{tuple(self.hidden.shape)}"
            )
        if self.tokens is not None:
            check_tokens(self.tokens, rows=rows, d_vocab=d_vocab, name="tokens")
        if self.sets is not None:
            check_sets(self.sets, rows=rows, d_vocab=d_vocab)

    @property
    def n_rows(self) -> int:
        """Number of the caller's rows."""
        return self.hidden.shape[0]

    @property
    def n_references(self) -> int | None:
        """Number of separate reference rows; None when references are among the rows."""
        if self.reference is None:
            return None
        for separate in (self.reference.hidden, self.reference.logits):
            if separate is not None:
                return separate.shape[0]
        return None

    @property
    def n_unembedded(self) -> int:
        """Number of rows that are multiplied with the unembedding."""
        n = self.n_rows if self.against is None else 2 * self.n_rows
        return n + (0 if self.given_logits is not None else self.n_references or 0)

    @property
    def n_likely(self) -> int:
        """How many of the most likely tokens any part of the request needs."""
        request = self.request
        wanted = max(request.top_k, request.overlap_k, 2 if request.gap else 0)
        return min(wanted, self.unembedding.d_vocab)

    @property
    def given_logits(self) -> Float[Tensor, "ref vocab"] | None:
        """Reference logits that were passed in, if they were."""
        return None if self.reference is None else self.reference.logits

    def vectors(self, slots: Int[Tensor, " slot"]) -> Float[Tensor, "slot d_model"]:
        """Return the float32 vectors of some slots of the plan (zeros where logits are given)."""
        n, n_references = self.n_rows, self.n_references or 0
        rows = self.hidden.detach()[slots.clamp_max(n - 1)].float()
        if n_references and self.reference is not None:
            chosen = (slots >= n) & (slots < n + n_references)
            if self.reference.hidden is None:
                rows[chosen] = 0.0
            else:
                rows[chosen] = take(self.reference.hidden, slots[chosen] - n, like=rows)
        if self.against is not None:
            chosen = slots >= n + n_references
            rows[chosen] = take(self.against, slots[chosen] - n - n_references, like=rows)
        return rows


def take(
    source: Float[Tensor, "any width"], rows: Int[Tensor, " row"], *, like: Tensor
) -> Float[Tensor, "row width"]:
    """Return some rows of a tensor that may live on another device, in the dtype of `like`."""
    return source.detach()[rows.to(source.device)].to(like)
