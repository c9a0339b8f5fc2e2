"""What a readout is asked for, and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which statistics to compute; what is not asked for costs nothing.

    Attributes:
        entropy: entropy of every row (bits).
        top_k: number of most likely tokens to list with logits and log-probabilities (0: none).
        gap: difference of the two largest logits.
        overlap_k: size of the most-likely-token sets behind `overlap_ids`, `against.jaccard` and
            `set_topk_mass` (0: none).
        kl_to_reference: KL(row || reference), bits.
        kl_from_reference: KL(reference || row), bits.
        js: Jensen-Shannon divergence, bits.
        l1: sum of absolute differences of probabilities, 0..2.
        cosine: cosine of bias-free, untransformed logits with those of the reference.
        extremes: largest absolute logit and smallest log-probability.

    The four divergences apply to the reference and to `against`, where these are given.
    """

    entropy: bool = True
    top_k: int = 20
    gap: bool = True
    overlap_k: int = 0
    kl_to_reference: bool = True
    kl_from_reference: bool = True
    js: bool = True
    l1: bool = True
    cosine: bool = True
    extremes: bool = True

    def __post_init__(self) -> None:
        for name in ("top_k", "overlap_k"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; pass 0 for none or a count")

    @property
    def needs_entropy(self) -> bool:
        """Whether entropies are wanted, or needed for what is wanted."""
        return self.entropy or self.js


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The distributions that rows are compared with, usually the model's own prediction.

    Exactly one of three forms:

    - ``Reference(index=...)``: `index[row]` is another *row of the same call* (the last layer's);
      its logits are computed once and shared by all rows that point to it.
    - ``Reference(index=..., hidden=...)``: `index[row]` is a row of `hidden`, unembedded alike.
    - ``Reference(index=..., logits=...)``: `index[row]` is a row of given logits, taken as they
      are (any transform included).

    An index of -1 means that the row has no reference; its divergences are NaN.
    """

    index: Int[Tensor, " row"]
    hidden: Float[Tensor, "ref d_model"] | None = None
    logits: Float[Tensor, "ref vocab"] | None = None

    def __post_init__(self) -> None:
        if self.hidden is not None and self.logits is not None:
            raise ConfigError("a Reference has hidden rows or logits, not both; drop one of them")
        if self.index.ndim != 1 or self.index.is_floating_point():
            raise ConfigError("Reference.index must be a 1-D integer tensor, one entry per row")


@dataclass(frozen=True)
class TokenSets:
    """Sets of token ids and, for every row, which of the sets it wants the mass of.

    Attributes:
        ids: [set, longest] token ids, padded with -1; unique within a set.
        index: [row, n_sets] which set, or -1 for none.
    """

    ids: Int[Tensor, "set longest"]
    index: Int[Tensor, "row n_sets"]

    @staticmethod
    def of(
        sets: Sequence[Iterable[int]], index: Int[Tensor, "row n_sets"] | Sequence[Sequence[int]]
    ) -> TokenSets:
        """Build from ragged sets; a repeated id counts once."""
        unique = [list(dict.fromkeys(int(token) for token in members)) for members in sets]
        longest = max((len(members) for members in unique), default=0)
        ids = torch.full((max(len(unique), 1), max(longest, 1)), -1, dtype=torch.long)
        for row, members in enumerate(unique):
            ids[row, : len(members)] = torch.tensor(members, dtype=torch.long)
        return TokenSets(ids=ids, index=torch.as_tensor(index, dtype=torch.long))


def check_tokens(tokens: Tensor, *, rows: int, d_vocab: int, name: str) -> None:
    """Raise ConfigError unless `tokens` is [rows, any] of ids in -1..d_vocab-1."""
    if tokens.ndim != 2 or tokens.shape[0] != rows or tokens.is_floating_point():
        raise ConfigError(f"{name} must be an integer tensor [row, any] for {rows} rows")
    _check_range(tokens, limit=d_vocab, name=name)


def check_sets(sets: TokenSets, *, rows: int, d_vocab: int) -> None:
    """Raise ConfigError unless ids and indices of `sets` are in range."""
    _check_range(sets.ids, limit=d_vocab, name="TokenSets.ids")
    if sets.index.ndim != 2 or sets.index.shape[0] != rows:
        raise ConfigError(f"TokenSets.index must be [row, n_sets] for {rows} rows")
    _check_range(sets.index, limit=sets.ids.shape[0], name="TokenSets.index")


def check_reference(reference: Reference, *, rows: int, d_model: int, d_vocab: int) -> None:
    """Raise ConfigError unless the reference fits the rows and the unembedding."""
    if reference.index.shape[0] != rows:
        raise ConfigError(
            f"Reference.index has {reference.index.shape[0]} entries for {rows} rows; "
            "pass one per row (-1 for none)"
        )
    limit = rows
    if reference.hidden is not None:
        if reference.hidden.ndim != 2 or reference.hidden.shape[1] != d_model:
            raise ConfigError(f"Reference.hidden must be [ref, {d_model}]")
        limit = reference.hidden.shape[0]
    elif reference.logits is not None:
        if reference.logits.ndim != 2 or reference.logits.shape[1] != d_vocab:
            raise ConfigError(f"Reference.logits must be [ref, {d_vocab}]")
        limit = reference.logits.shape[0]
    _check_range(reference.index, limit=limit, name="Reference.index")


def _check_range(ids: Tensor, *, limit: int, name: str) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < -1 or high >= limit:
        raise ConfigError(
            f"{name} holds values {low}..{high}; allowed are -1 (none) to {limit - 1}"
        )
