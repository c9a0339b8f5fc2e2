"""What the attention kernel reads and computes, for the length of a run.

transformers hands queries, keys, values and mask of every block to a function that it looks up in
``ALL_ATTENTION_FUNCTIONS``. While some run looks inside attention, that name in the modelling
module stands for a registry that hands out the same functions, each behind a tap that asks whose
pass it is in; in any other pass the function is called as it is.

Scores and patterns are recomputed from what the kernel reads: the model keeps the kernel it was
loaded with, and its output is exchanged only where an edit changed a pattern.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layerscope.errors import CapabilityError
from layerscope.models.backends.huggingface.hooks import Carrier, Recorder
from layerscope.models.backends.huggingface.packing import packed_attention
from layerscope.models.backends.huggingface.taps import Taps, names_of
from layerscope.models.backends.recording import current_run
from layerscope.models.identities import relative_error

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
# Low-precision patterns sum to one within this.
_DISTRIBUTION_TOLERANCE = 1e-2


@dataclass(frozen=True)
class KernelShape:
    """The sizes of what one block's attention kernel reads.

    `error` is the largest difference between the kernel's output and that of the recomputed
    pattern, relative to the largest value. `calls` is how often a pass calls the kernel.
    """

    n_heads: int
    n_kv_heads: int
    d_key: int
    d_value: int
    error: float
    calls: int = 1


def has_kernel(attention: nn.Module) -> bool:
    """Return True when the attention module takes its kernel from transformers' registry."""
    return _REGISTRY in names_of(attention)


class Probe:
    """A pass that only looks at what kernels read, and whether their patterns are understood."""

    def __init__(self) -> None:
        self.shapes: dict[nn.Module, KernelShape] = {}

    def see(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, rest: Any
    ) -> None:
        """Note the sizes of one call, and how well its output is reproduced."""
        output, options = rest
        given: Tensor = output[0] if isinstance(output, tuple) else output
        try:
            scores = attention_scores(module, query, key, mask, options)
            pattern = _pattern(scores, options.get("s_aux"))
            mixed = (pattern @ _for_queries(value, query.shape[1])).transpose(1, 2)
            error = relative_error(given.reshape(mixed.shape), mixed)
        except (CapabilityError, RuntimeError):
            error = math.inf
        known = self.shapes.get(module)
        calls = 1 if known is None else known.calls + 1
        self.shapes[module] = KernelShape(
            query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], error, calls
        )


class _TappedRegistry:
    """Stands for a registry of attention functions; the functions ask the current run first."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def get_interface(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return functools.partial(_tapped, self._real.get_interface(*args, **kwargs))

    def get(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return functools.partial(_tapped, self._real.get(*args, **kwargs))

    def __getitem__(self, key: str) -> Callable[..., Any]:
        return functools.partial(_tapped, self._real[key])

    def __contains__(self, key: str) -> bool:
        return key in self._real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


TAPS = Taps(_REGISTRY, _TappedRegistry)
"""One for all models: a family shares the modelling module whose name is exchanged."""


def _tapped(
    kernel: Callable[..., Any],
    module: nn.Module,
    query: Float[Tensor, "batch head query d"],
    key: Float[Tensor, "batch kv_head key d"],
    value: Float[Tensor, "batch kv_head key d_value"],
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    run = current_run()
    if not isinstance(run, Recorder):
        output = kernel(module, query, key, value, attention_mask, *args, **kwargs)
        if isinstance(run, Probe):
            run.see(module, query, key, value, attention_mask, (output, kwargs))
        return output
    n_new = query.shape[2]
    query_at = Carrier(module, "query")
    if run.wants(query_at):
        query = run.visit(query_at, query)
    key = _visit_new(run, Carrier(module, "key"), key, n_new)
    value = _visit_new(run, Carrier(module, "value"), value, n_new)
    if run.plan.packed is not None:
        heads, ends = (query, key, value), module is run.asks_at_ends
        return packed_attention(kernel, module, heads, run.plan, args, kwargs, ends=ends)
    output = kernel(module, query, key, value, attention_mask, *args, **kwargs)
    scores_at, pattern_at = Carrier(module, "scores"), Carrier(module, "pattern")
    if not (run.wants(scores_at) or run.wants(pattern_at)):
        return output
    scores = attention_scores(module, query, key, attention_mask, kwargs)
    sinks = kwargs.get("s_aux")
    plain = edited = _pattern(scores, sinks)
    if run.wants(scores_at):
        changed = run.visit(scores_at, scores)
        if changed is not scores:
            edited = _pattern(changed, sinks)
    if run.wants(pattern_at):
        softmax, edited = edited, run.visit(pattern_at, edited)
        if run.edits(pattern_at):
            _warn_unless_distribution(softmax, edited, sinks is not None)
    if edited is plain and not run.plan.gradients:
        return output
    return _with_pattern(output, plain, edited, value)


def _visit_new(
    run: Recorder, carrier: Carrier, whole: Float[Tensor, "batch kv_head key d"], n_new: int
) -> Float[Tensor, "batch kv_head key d"]:
    """Let a run see the keys or values of its own tokens, without those that a cache brought."""
    if not run.wants(carrier):
        return whole
    n_past = whole.shape[2] - n_new
    given = whole[:, :, n_past:] if n_past else whole
    seen = run.visit(carrier, given)
    if seen is given:
        return whole
    edited = torch.cat([whole[:, :, :n_past], seen], dim=2) if n_past else seen
    run.exchanged.append((whole, edited))
    return edited


def attention_scores(
    module: nn.Module,
    query: Float[Tensor, "batch head query d"],
    key: Float[Tensor, "batch kv_head key d"],
    attention_mask: Any,
    options: dict[str, Any],
) -> Float[Tensor, "batch head query key"]:
    """Return what the softmax reads: scaled, capped, biased; minus infinity where masked.

    Raises:
        CapabilityError: the kernel takes a mask that is not a tensor.
    """
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Query heads that share keys are one product, and scaling the smaller factor saves a pass; in
    # low precision the order of eager attention is kept, for its rounding.
    early = query.dtype in (torch.float32, torch.float64)
    grouped = (query * scaling if early else query).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ key.transpose(-1, -2)).view(*query.shape[:-1], key.shape[-2])
    if not early:
        scores = scores * scaling
    softcap = options.get("softcap")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    bias = options.get("position_bias")
    if bias is not None:
        scores = scores + bias
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    hidden = _hidden(scores, attention_mask, {**options, "is_causal": causal})
    if isinstance(attention_mask, Tensor) and attention_mask.is_floating_point():
        scores = scores + attention_mask[..., : scores.shape[-1]]
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _hidden(
    scores: Tensor, mask: Any, options: dict[str, Any]
) -> Bool[Tensor, "#batch #head query key"] | None:
    """Return True where a query may not look."""
    n_keys = scores.shape[-1]
    if isinstance(mask, Tensor) and mask.ndim == 4:
        mask = mask[..., :n_keys]
        if mask.dtype == torch.bool:
            return ~mask
        # Added masks hide with the least number of their dtype; ALiBi and its like stay far above.
        return mask <= torch.finfo(mask.dtype).min / 2
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise CapabilityError(
            f"the attention kernel of this model masks with a {type(mask).__name__}; load it with "
            "attn_implementation='sdpa' or 'eager' to see scores and patterns"
        )
    # Kernels that mask by themselves: causal, within the window, and not at padding.
    hidden = _not_causal(scores, options)
    if mask is not None:
        padding = ~mask.bool()[:, None, None, -n_keys:]
        hidden = padding if hidden is None else hidden | padding
    return hidden


def _not_causal(scores: Tensor, options: dict[str, Any]) -> Bool[Tensor, "query key"] | None:
    if not options["is_causal"]:
        return None
    n_queries, n_keys = scores.shape[-2:]
    keys = torch.arange(n_keys, device=scores.device)
    queries = torch.arange(n_keys - n_queries, n_keys, device=scores.device)[:, None]
    hidden = keys > queries
    window = options.get("sliding_window")
    return hidden | (keys <= queries - window) if window else hidden


def _pattern(
    scores: Float[Tensor, "batch head query key"], sinks: Tensor | None
) -> Float[Tensor, "batch head query key"]:
    """Return the softmax over keys (and the head's sink, which takes a share of its own)."""
    wide = scores.float()
    # Padding that may look nowhere looks nowhere; its softmax would be NaN.
    nowhere = wide.amax(dim=-1, keepdim=True).isneginf()
    padded = bool(nowhere.any())
    if padded:
        wide = wide.masked_fill(nowhere, 0.0)
    if sinks is not None:
        sink = sinks.to(wide).reshape(1, -1, 1, 1).expand(wide.shape[0], -1, wide.shape[2], 1)
        weights = torch.softmax(torch.cat([wide, sink], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(wide, dim=-1)
    return (weights.masked_fill(nowhere, 0.0) if padded else weights).to(scores.dtype)


def _with_pattern(output: Any, plain: Tensor, edited: Tensor, value: Tensor) -> Any:
    """Return a kernel's output with another pattern, exchanged only for queries that it changes.

    Gradients pass through the pattern everywhere; the numbers of unchanged queries stay the
    kernel's own.
    """
    changed = (edited != plain).any(dim=-1, keepdim=True)
    mixed = (edited @ _for_queries(value, edited.shape[1])).transpose(1, 2)
    first: Tensor = output[0] if isinstance(output, tuple) else output
    kept = first.reshape(mixed.shape)
    if mixed.requires_grad:
        kept = kept.detach() + (mixed - mixed.detach())
    # Contiguous like the kernel's own: some families only view it in another shape.
    z = torch.where(changed.transpose(1, 2), mixed, kept).reshape(first.shape).contiguous()
    return (z, *output[1:]) if isinstance(output, tuple) else z


def _warn_unless_distribution(softmax: Tensor, edited: Tensor, sinks: bool) -> None:
    """Warn when an edit leaves weights over the keys that are no distribution."""
    changed = (edited != softmax).any(dim=-1)
    weights = edited[changed].float()
    total = weights.sum(dim=-1)
    wrong = (weights < 0).any(dim=-1) | (total > 1 + _DISTRIBUTION_TOLERANCE)
    if not sinks:
        wrong |= total < 1 - _DISTRIBUTION_TOLERANCE
    if bool(wrong.any()):
        warnings.warn(
            f"an edit of an attention pattern leaves {int(wrong.sum())} rows that are no "
            "distribution over the keys (negative, or not summing to 1); edit the scores to keep "
            "one",
            stacklevel=2,
        )


def _for_queries(heads: Tensor, n_heads: int) -> Float[Tensor, "batch head key d"]:
    """Return keys or values once per query head: head h reads group h * n_kv_heads // n_heads."""
    return heads.repeat_interleave(n_heads // heads.shape[1], dim=1)
