"""Rows of different beginnings in one row of tokens: linear layers see them as one long row.

Everything in a block but attention treats each token by itself. So rows that continue a cache at
different positions need no padding to share a pass: they are laid one after the other. Attention is
one call of compiled loops for all of them where the kernel is torch's and these loops are to be
had; else the kernel is called once for each piece of equal rows, with the keys and values of its
own past. The model's own mask is not used, so models with windows take part as long as rows are
shorter than those. Every model is proved once before it may.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from layerscope.errors import CapabilityError, LayerscopeError
from layerscope.models.backends.huggingface.cache import KeyValueCache
from layerscope.models.batches import TokenBatch
from layerscope.models.identities import bound_of
from layerscope.models.run import Capture, Packed, Piece, RunPlan, Start, plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerscope.models.backends.huggingface.backend import HuggingFaceBackend

_PROOF_TOKENS = 9


def packed_inputs(given: RunPlan, device: torch.device) -> dict[str, Any]:
    """Return what the model is called with; its mask is one that nothing looks at."""
    assert given.packed is not None
    return {
        "input_ids": given.batch.ids.to(device),
        "position_ids": given.packed.position_ids().to(device),
        # Prepared masks of four axes are handed to the kernel as they are.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "use_cache": False,
        "return_dict": True,
    }


def packed_attention(
    kernel: Callable[..., Any],
    module: nn.Module,
    heads: tuple[Tensor, Tensor, Tensor],
    given: RunPlan,
    args: tuple[Any, ...],
    options: dict[str, Any],
    *,
    ends: bool = False,
) -> tuple[Tensor, None]:
    """Let every row attend to its own past and to itself, by loops of ours or the block's kernel.

    Args:
        heads: queries, keys and values of all tokens, [1, head, pos, d].
        ends: only the last token of every row asks; what the others get is zero.
    """
    assert given.packed is not None and isinstance(given.cache, KeyValueCache)
    block = getattr(module, "layer_idx", None)
    if not isinstance(block, int) or options.get("position_bias") is not None:
        raise CapabilityError("the attention of this model does not say which block it is in")
    query, key, value = heads
    if kernel is sdpa_attention_forward and not given.gradients:
        output = _in_one_call(heads, given.packed, given.cache.stored(block), options, ends=ends)
        if output is not None:
            return output[None], None
    shape = query.shape[2], query.shape[1], value.shape[-1]
    found = query.new_zeros(shape) if ends else query.new_empty(shape)
    at = 0
    grouped = kernel is sdpa_attention_forward and query.shape[1] > key.shape[1]
    sharing = query.shape[1] // key.shape[1] if grouped else 1
    hidden = _causal(given.packed.n_columns, query).repeat_interleave(sharing, dim=2)
    for piece in given.packed.pieces:
        query, key, value = (
            part[0, :, at : at + piece.size].unflatten(1, (-1, piece.width)).transpose(0, 1)
            for part in heads
        )
        into = found[at : at + piece.size].unflatten(0, (-1, piece.width))
        at += piece.size
        if piece.column:
            keys, values = given.cache.past(block, piece.rows, piece.column)
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        end = piece.column + piece.width
        asks = 1 if ends else piece.width
        mask = hidden[:, :, (end - asks) * sharing : end * sharing, :end]
        if grouped:
            output = _grouped(query[:, :, -asks:], key, value, mask, options.get("scaling"))
        else:
            output = kernel(module, query[:, :, -asks:], key, value, mask, *args, **options)
        into[:, -asks:] = output[0] if isinstance(output, tuple) else output
    return found[None], None


@functools.lru_cache(maxsize=1)
def _loops() -> ModuleType | None:
    try:
        from layerscope.products import attention
    except (ImportError, OSError):  # no numba, or none that goes with this numpy
        return None
    return attention


def _in_one_call(
    heads: tuple[Tensor, Tensor, Tensor],
    packed: Packed,
    past: tuple[Tensor, Tensor, Int[Tensor, " row"] | None],
    options: dict[str, Any],
    *,
    ends: bool,
) -> Float[Tensor, "token head d_value"] | None:
    """Return what compiled loops make of all pieces; None where there are none, or do not suit."""
    loops, (keys, values, rows) = _loops(), past
    if loops is None or not loops.suits(*heads, keys, values):
        return None
    # Some families store something smaller, which their blocks make keys of.
    if keys.shape[1::2] != heads[1].shape[1::2] or values.shape[1::2] != heads[2].shape[1::2]:
        return None
    table = packed.table
    if rows is not None:
        table = table.clone()
        table[:, 3] = rows[table[:, 3]]
    query, key, value = (part[0] for part in heads)
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return loops.causal_attention(query, key, value, (keys, values), table, scale=scale, ends=ends)


def _grouped(
    query: Float[Tensor, "row head query d"],
    key: Float[Tensor, "row kv_head key d"],
    value: Float[Tensor, "row kv_head key d_value"],
    mask: Float[Tensor, "1 1 query_times_sharing key"],
    scale: float | None,
) -> Float[Tensor, "row query head d_value"]:
    """Let the heads that share keys ask them as one head with more queries: no key is copied."""
    sharing = query.shape[1] // key.shape[1]
    together = query.unflatten(1, (-1, sharing)).transpose(2, 3).flatten(2, 3)
    mixed = nn.functional.scaled_dot_product_attention(
        together, key, value, attn_mask=mask, scale=scale
    )
    return mixed.unflatten(2, (-1, sharing)).transpose(1, 2).flatten(2, 3)


def _causal(n_columns: int, like: Tensor) -> Tensor:
    """Return the mask of whole rows, to add, [1, 1, query, key]; a piece takes its part of it."""
    hidden = like.new_full((n_columns, n_columns), torch.finfo(like.dtype).min)
    return hidden.triu(1)[None, None]


def only_ends(packed: Packed, columns: Int[Tensor, "1 pos"]) -> bool:
    """Return whether columns of packed rows are the last token of every row, and no other."""
    return columns[0].tolist() == [end - 1 for end in accumulate(_widths(packed.pieces))]


def _widths(pieces: tuple[Piece, ...]) -> list[int]:
    return [piece.width for piece in pieces for _ in piece.rows]


def shortest_window(model: PreTrainedModel) -> int | None:
    """Return how many tokens any block of a model can see at least; None for all."""
    # Families call it sliding_window, window_size, attention_chunk_size, ...; too small is safe.
    settings: dict[str, Any] = model.config.get_text_config().to_dict()
    words = ("window", "chunk")
    found = [
        size
        for name, size in settings.items()
        if any(word in name for word in words) and "pattern" not in name
    ]
    sizes = [size for size in found if isinstance(size, int) and not isinstance(size, bool)]
    return min((size for size in sizes if size > 0), default=None)


def disprove_packing(backend: HuggingFaceBackend) -> str:
    """Return why packed rows are not what they are apart, "" where they are.

    Two rows of tokens, each continued from several positions, against the plain pass; all of their
    tokens, and the ends of rows alone, for which the last block computes less.
    """
    n_tokens = min(_PROOF_TOKENS, backend.info.n_ctx or _PROOF_TOKENS)
    known = min(backend.info.n_embeddings, backend.info.d_vocab)
    ids = (torch.arange(2 * n_tokens).view(2, n_tokens) + 3) % known
    limit = shortest_window(backend.model)
    if limit is not None and limit < n_tokens:
        return f"its windows are of {limit} tokens"
    whole = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), (n_tokens,) * 2)
    middle = n_tokens // 2
    pieces = (
        Piece(0, (1,), n_tokens),
        Piece(middle, (0, 1, 0), n_tokens - middle),
        Piece(n_tokens - 1, (1, 0), 1),
    )
    sites = ("resid_pre.0", "final_norm")
    try:
        plain = backend.execute(plan(backend, whole, capture=sites, logits=None, keep_cache=True))
        values = list(plain.activations.values())
        first, last = (_packed(value, pieces) for value in values)
        tokens = _packed(ids, pieces)
        row = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), (tokens.shape[1],))
        ends = [at - 1 for at in accumulate(_widths(pieces))]
        differences: list[float] = []
        for columns in (None, ends):
            request = plan(
                backend,
                row,
                start=Start(0, first),
                capture=Capture("final_norm", positions=columns),
                logits=None,
                cache=plain.cache,
                lean=columns is not None,
                packed=Packed(pieces),
            )
            (found,) = backend.execute(request).activations.values()
            expected = last if columns is None else last[:, columns]
            differences.append(float((found - expected).abs().max() / last.abs().max()))
    except LayerscopeError as error:
        return str(error)
    # Foreign code: whatever it raises when given such rows means that it takes none.
    except Exception as error:
        return (
            f"given packed rows, it raised {type(error).__name__}: {' '.join(str(error).split())}"
        )
    difference = max(differences)
    if difference <= bound_of(backend.dtype):
        return ""
    return f"they differ from rows apart by {difference:.2g}, relatively"


def _packed(values: Tensor, pieces: tuple[Piece, ...]) -> Tensor:
    """Lay [row, pos, ...] out as the one row that pieces describe."""
    parts = [
        values[list(piece.rows), piece.column : piece.column + piece.width].flatten(0, 1)
        for piece in pieces
    ]
    return torch.cat(parts)[None]
