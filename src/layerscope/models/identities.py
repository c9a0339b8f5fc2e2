"""Identities that a model must satisfy before its sites are believed.

One forward pass over a few tokens, everything captured, and what the sites claim is recomputed from
the weights and compared. An error is relative: to the size of what is compared for logits and
norms, and element by element to the terms of a sum for the residual stream, so that one huge
coordinate cannot hide a mistake elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerscope.errors import IdentityError
from layerscope.models.backends.base import Backend, Execution
from layerscope.models.prompts import TokenBatch
from layerscope.models.run import Start, plan
from layerscope.models.sites import Site
from layerscope.readout.unembedding import Unembedding

STATEMENTS = {
    "embedding": "the embedding rows (scaled, with positions) are what block 0 reads",
    "stream": "what a block leaves is what the next one reads",
    "attention_sum": "resid_pre + attn_out = resid_mid",
    "residual_sum": "resid_pre + attn_out + mlp_out = resid_post",
    "next_norm": "the input norm of each block, applied to resid_pre, gives what attention reads",
    "final_norm": "the final norm, applied to the last residual, gives what is unembedded",
    "unembedding": "norm and unembedding of the last residual give the model's logits",
    "causality": "changing the last token changes no earlier logits",
    "resumption": "starting in the middle from the stored residual gives the same last logits",
    "pattern": "the attention pattern, recomputed, times the values gives what the kernel gave",
    "head_sum": "the heads' outputs and the bias sum to what the output projection gives",
    "neurons": "the activation function of pre, times up in a gated MLP, gives post",
}
# What a failure takes away: the other identities refuse the model, these only their sites.
_WITHDRAWS = {
    "pattern": ("attn.scores", "attn.pattern"),
    "head_sum": ("attn.z", "attn.out"),
    "neurons": ("mlp.pre", "mlp.up", "mlp.post"),
}

# Norms and the readout compute in float32 even where a model is float64.
_BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
_TOKENS = 8
_VOCABULARY_TILE = 16_384


@dataclass(frozen=True)
class Identity:
    """One identity on one model: its worst error, the bound, and where the worst was found."""

    name: str
    error: float
    bound: float
    where: str = ""

    @property
    def statement(self) -> str:
        """What was asserted, in words."""
        return STATEMENTS[self.name]

    @property
    def passed(self) -> bool:
        """True when the error is within its bound; never for NaN."""
        return self.error <= self.bound

    @property
    def withdraws(self) -> tuple[str, ...]:
        """Kinds of the sites that are refused when it fails; empty where the model is."""
        return _WITHDRAWS.get(self.name, ())

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able account; an error that is not finite is None."""
        return {
            "name": self.name,
            "statement": self.statement,
            "passed": self.passed,
            "error": self.error if math.isfinite(self.error) else None,
            "bound": self.bound,
            "where": self.where,
        }


@dataclass(frozen=True)
class IdentityReport:
    """All identities of one model."""

    family: str
    dtype: str
    device: str
    identities: tuple[Identity, ...]

    @property
    def passed(self) -> bool:
        """True when every identity holds that the model cannot do without."""
        return not any(not identity.withdraws for identity in self.failures)

    @property
    def failures(self) -> tuple[Identity, ...]:
        """The identities that do not hold."""
        return tuple(identity for identity in self.identities if not identity.passed)

    def require(self, name: str) -> None:
        """Raise IdentityError naming the model, the failed identities, their errors and bounds."""
        if self.passed:
            return
        failed = "; ".join(
            f"{identity.name} ({identity.statement}) is off by {identity.error:.2g}"
            f"{' at ' + identity.where if identity.where else ''}, bound {identity.bound:.2g}"
            for identity in self.failures
            if not identity.withdraws
        )
        raise IdentityError(f"{name} (read as {self.family}) is refused: {failed}")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able account."""
        return {
            "family": self.family,
            "dtype": self.dtype,
            "device": self.device,
            "passed": self.passed,
            "identities": [identity.to_dict() for identity in self.identities],
        }


def check(backend: Backend, *, thorough: bool = True) -> IdentityReport:
    """Run every identity that applies, on two short rows that differ in their last token.

    Args:
        backend: the model.
        thorough: also resume a second pass in the middle and unembed one position of it; what a
            family that is not in the table has not proved in the tests.
    """
    batch = _probe(backend)
    with torch.no_grad():
        execution = backend.execute(plan(backend, batch, capture=backend.sites()))
        found = [*_errors(backend, batch, execution)]
        if thorough:
            found.append(_resumption(backend, batch, execution))
    bound = bound_of(backend.dtype)
    worst: dict[str, Identity] = {}
    for name, error, where in found:
        known = worst.get(name)
        if known is None or not error <= known.error:
            worst[name] = Identity(name, error, bound, where)
    for identity in worst.values():
        if not identity.passed and identity.withdraws:
            backend.withdraw(
                identity.withdraws,
                f"{identity.statement} is off by {identity.error:.2g} at {identity.where}, bound "
                f"{identity.bound:.2g}",
            )
    return IdentityReport(
        family=backend.info.family,
        dtype=str(backend.dtype).removeprefix("torch."),
        device=str(backend.device),
        identities=tuple(worst[name] for name in STATEMENTS if name in worst),
    )


def _probe(backend: Backend) -> TokenBatch:
    """Return the rows of the check: tokens spread over the vocabulary, the same every time."""
    info = backend.info
    length = _TOKENS if info.n_ctx is None else max(1, min(_TOKENS, info.n_ctx))
    known = min(info.n_embeddings, info.d_vocab)
    row = [(13 + 7919 * index) % known for index in range(length)]
    return TokenBatch.from_ids([row, [*row[:-1], (row[-1] + 1) % known]])


def _errors(
    backend: Backend, batch: TokenBatch, execution: Execution
) -> Iterator[tuple[str, float, str]]:
    """Yield (identity, error, where) for every place where an identity applies."""
    values = execution.activations
    n_layers = backend.info.n_layers
    logits = execution.logits
    assert logits is not None
    first = values[Site("resid_pre", 0)]
    expected = backend.expected_embedding(batch.ids, batch.position_ids())
    yield "embedding", relative_error(first, expected), ""
    for layer in range(n_layers):
        yield from _block_errors(backend, values, layer)
    last = values[Site("resid_post", n_layers - 1)]
    _, norm = backend.norm_at(n_layers, "final")
    hidden = values[Site("final_norm")]
    yield "final_norm", relative_error(hidden, norm(last)), ""
    yield "unembedding", _logit_error(backend.unembedding, norm(last), logits), ""
    yield from backend.self_checks(values)
    if batch.width > 1:
        yield "causality", relative_error(logits[1, :-1], logits[0, :-1]), ""


def _resumption(
    backend: Backend, batch: TokenBatch, execution: Execution
) -> tuple[str, float, str]:
    """Compare the last logits of a pass that starts in the middle with those of the full one."""
    layer = backend.info.n_layers // 2
    start = Start(layer, execution.activations[Site("resid_pre", layer)])
    resumed = backend.execute(plan(backend, batch, start=start, logits="last"))
    assert resumed.logits is not None and execution.logits is not None
    error = relative_error(resumed.logits[:, 0], execution.logits[:, -1])
    return "resumption", error, f"block {layer}"


def _block_errors(backend: Backend, values: Any, layer: int) -> Iterator[tuple[str, float, str]]:
    where = f"block {layer}"
    before = values[Site("resid_pre", layer)]
    attention = values[Site("attn_out", layer)]
    mlp = values[Site("mlp_out", layer)]
    after = values[Site("resid_post", layer)]
    middle = values.get(Site("resid_mid", layer))
    if middle is not None:
        yield "attention_sum", _sum_error(middle, before, attention), where
    yield "residual_sum", _sum_error(after, before, attention, mlp), where
    if layer + 1 < backend.info.n_layers:
        following = values[Site("resid_pre", layer + 1)]
        yield "stream", relative_error(following, after), where
    name, norm = backend.norm_at(layer, "next_norm")
    if name != backend.norm_at(layer, "final")[0]:
        yield "next_norm", relative_error(values[Site("attn_in", layer)], norm(before)), where


def bound_of(dtype: torch.dtype) -> float:
    """Return the largest relative error at which an identity holds in a dtype."""
    return _BOUNDS.get(dtype, max(_BOUNDS.values()))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value; infinite for other shapes."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.float(), expected.to(actual.device).float()
    return _ratio((actual - expected).abs().max(), expected.abs().max())


def _sum_error(total: Tensor, *terms: Tensor) -> float:
    """Return the largest difference of a sum over the sizes of its own terms."""
    if any(term.shape != total.shape for term in terms):
        return math.inf
    wide = torch.promote_types(total.dtype, torch.float32)
    parts = [term.to(total.device, wide) for term in terms]
    difference = (total.to(wide) - torch.stack(parts).sum(0)).abs()
    size = torch.stack([*parts, total.to(wide)]).abs().sum(0)
    return float((difference / size.clamp(min=torch.finfo(wide).tiny)).max())


def _logit_error(unembedding: Unembedding, hidden: Tensor, logits: Tensor) -> float:
    """Compare logits a slice of the vocabulary at a time: a head is never copied whole."""
    rows = hidden.flatten(0, -2)
    given = logits.flatten(0, -2)
    worst = torch.zeros((), device=given.device)
    for start in range(0, unembedding.d_vocab, _VOCABULARY_TILE):
        part = slice(start, start + _VOCABULARY_TILE)
        bias = unembedding.bias
        tile = replace(
            unembedding,
            weight=unembedding.weight[part],
            bias=None if bias is None else bias[part],
        )
        difference = (tile.logits(rows).to(given.device) - given[:, part].float()).abs().max()
        worst = torch.maximum(worst, difference)
    return _ratio(worst, given.float().abs().max())


def _ratio(difference: Tensor, size: Tensor) -> float:
    if float(difference) == 0.0:
        return 0.0
    return float(difference) / float(size) if float(size) else math.inf
