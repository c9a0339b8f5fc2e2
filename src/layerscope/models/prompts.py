"""How prompts become a batch of token ids with exactly one BOS."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from layerscope.errors import PromptError
from layerscope.models.batches import PaddingSide, RowOffsets, Span, TokenBatch, check_side
from layerscope.models.chat import Tuning
from layerscope.models.prompt import Prompt, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Prompt",
    "PromptLike",
    "PromptsLike",
    "TokenBatch",
    "encode_plain",
    "leading_specials",
    "tokenize",
]

# Tokenizers of instruct models that were given raw text: each is warned of once.
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


PromptLike: TypeAlias = str | Prompt | Sequence[int]
PromptsLike: TypeAlias = PromptLike | Sequence[PromptLike] | Tensor | Mapping[str, Any] | TokenBatch


@dataclass(frozen=True)
class _Encoded:
    ids: tuple[int, ...]
    offsets: RowOffsets | None


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptsLike,
    *,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide = "right",
    max_length: int | None = None,
    vocab_size: int | None = None,
    tuning: Tuning | None = None,
) -> TokenBatch:
    """Turn prompts into one padded batch.

    A text gets what its tokenizer puts in front of it (one BOS where the model uses one, nothing
    for GPT-2 or Qwen), never a second BOS, and never what the tokenizer appends (EOS, SEP); so
    does the text that a chat template renders. A plain string is raw text, so that positions count
    what was written; a `Prompt` without a format takes the model's default. Prompts given as ids
    are taken as they are. A batch, or a mapping with ``input_ids`` and ``attention_mask``, keeps
    its own padding. Offsets are those of the rendered text (see `render`).

    Args:
        tokenizer: the model's tokenizer.
        prompts: a text, ids, a `Prompt`, a sequence of these, a tensor [batch, pos] or a batch.
        prepend_bos: True prepends a BOS where there is none yet, ids included; False adds nothing
            (a BOS written in the text stays); None does what the tokenizer does.
        padding_side: where shorter rows are padded.
        max_length: most tokens a prompt may have (the model's context).
        vocab_size: number of ids the model knows; default: those of the tokenizer.
        tuning: whether the model is instruct-tuned. A base model refuses chats; the first raw text
            of an instruct model warns. Without it, what has no format is raw.

    Raises:
        PromptError: a prompt is empty, too long, starts with two BOS, has an id outside the
            vocabulary, or is an unmasked padded tensor; a BOS is asked of a tokenizer without; or
            a prompt is a chat, and the model or its template does not take it.
    """
    check_side(padding_side)
    size = len(tokenizer) if vocab_size is None else vocab_size
    batch = _ready_batch(prompts)
    if batch is not None:
        if prepend_bos:
            raise PromptError("prepend_bos=True cannot change a batch: build it with its BOS")
        # All at once where nothing is wrong; row by row to say what is.
        low, high = batch.ids.aminmax()
        fits = max_length is None or max(batch.lengths) <= max_length
        if not (fits and int(low) >= 0 and int(high) < size and min(batch.lengths) > 0):
            rows = [batch.row_ids(row) for row in range(len(batch))]
            _check_rows(rows, [None] * len(rows), max_length, size)
        return batch
    items = _as_prompts(cast(Any, prompts), tokenizer)
    bos = _bos_id(tokenizer, required=prepend_bos is True)
    texts = [
        None if item.ids is not None else _rendered(tokenizer, item, index, tuning)
        for index, item in enumerate(items)
    ]
    if prepend_bos is not False:  # without a BOS the text is a piece of something longer
        _warn_of_raw_text(tokenizer, items, tuning)
    front = _front(tokenizer, [text for text in texts if text], prepend_bos)
    encoded = [
        _take_ids(item.ids or (), bos if prepend_bos else None)
        if text is None
        else _encode_text(tokenizer, text, _label(index, item.key), front, bos)
        for index, (item, text) in enumerate(zip(items, texts, strict=True))
    ]
    rows = [item.ids for item in encoded]
    _check_rows(rows, [item.key for item in items], max_length, size)
    pad = tokenizer.pad_token_id
    pad_id = pad if isinstance(pad, int) and 0 <= pad < size else 0
    return TokenBatch.from_ids(
        rows, pad_id, padding_side, offsets=[item.offsets for item in encoded]
    )


def encode_plain(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[tuple[int, ...], RowOffsets | None]:
    """Return the ids of a text without special tokens, and their character spans if known.

    Raises:
        PromptError: the tokenizer has no token for some part of the text.
    """
    try:
        encoding = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=bool(tokenizer.is_fast),
            return_attention_mask=False,
            verbose=False,
        )
    # tokenizers raises bare Exceptions, e.g. for a word-level vocabulary without an unknown token.
    except Exception as error:
        raise PromptError(f"the tokenizer cannot encode {_short(text)}: {error}") from error
    ids = tuple(cast(list[int], encoding["input_ids"]))
    if not tokenizer.is_fast:
        return ids, None
    spans = cast(list[Span], encoding["offset_mapping"])
    return ids, tuple((int(start), int(end)) for start, end in spans)


def leading_specials(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the ids this tokenizer itself puts in front of a text (usually one BOS, or none).

    Found by encoding a probe, or else one of `texts`, with and without special tokens: the flag
    ``add_bos_token`` is not reliable, a post-processor may add a BOS that the flag denies.
    """
    special = set(tokenizer.all_special_ids)
    for text in ("a", *texts):
        try:
            plain, _ = encode_plain(tokenizer, text)
        except PromptError:
            continue  # a small word-level vocabulary may not know the probe
        if not plain or plain[0] in special:
            continue
        full = tuple(cast(list[int], tokenizer(text, verbose=False)["input_ids"]))
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
    return ()


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _label(index: int, key: str | None) -> str:
    return f"prompt {index}" + (f" ({key!r})" if key else "")


def _ready_batch(prompts: PromptsLike) -> TokenBatch | None:
    """Return the batch where ids come with their mask, else None."""
    if isinstance(prompts, TokenBatch):
        return prompts
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts or "attention_mask" not in prompts:
            raise PromptError("a mapping of prompts needs 'input_ids' and 'attention_mask'")
        try:
            ids, mask = (torch.as_tensor(prompts[name]) for name in ("input_ids", "attention_mask"))
        except (TypeError, ValueError) as error:
            raise PromptError(
                "input_ids and attention_mask must be rectangular: pad them, or pass bare sequences"
            ) from error
        if ids.ndim == 1:
            ids, mask = ids[None], mask[None]
        return TokenBatch.from_tensors(ids, mask)
    return None


def _as_prompts(
    prompts: PromptLike | Sequence[PromptLike] | Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    if isinstance(prompts, str):
        return [Prompt(text=prompts, format="raw")]
    if isinstance(prompts, Prompt):
        return [prompts]
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (1, 2) or prompts.is_floating_point() or not prompts.numel():
            raise PromptError(
                f"a tensor of prompts must hold integer ids [batch, pos], got {prompts.dtype} "
                f"{list(prompts.shape)}"
            )
        prompts = cast(list[list[int]], prompts.reshape(-1, prompts.shape[-1]).tolist())
    items: list[Any] = list(prompts)
    if not items:
        raise PromptError("there is no prompt: give at least one")
    if all(isinstance(item, Integral) for item in items):
        items = [items]
    converted = [_as_prompt(item, index) for index, item in enumerate(items)]
    for index, (item, prompt) in enumerate(zip(items, converted, strict=True)):
        # Ids in a Prompt are meant as they are; bare ones may be the output of a padding tokenizer.
        if prompt.ids is not None and not isinstance(item, Prompt):
            _check_unmasked(prompt.ids, index, tokenizer)
    return converted


def _as_prompt(item: Any, index: int) -> Prompt:
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        return Prompt(text=item, format="raw")
    try:
        return Prompt(ids=tuple(item))
    except TypeError as error:
        raise PromptError(
            f"prompt {index} is a {type(item).__name__}: give a text, a Prompt or token ids"
        ) from error


def _check_unmasked(ids: tuple[int, ...], index: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse bare ids that contain the padding id: the model would read padding as text."""
    pad = tokenizer.pad_token_id
    if not isinstance(pad, int):
        return
    # Where BOS and padding share an id, a single one at the very front is a BOS.
    body = ids[1:] if ids[:1] == (tokenizer.bos_token_id,) else ids
    if pad in body:
        raise PromptError(
            f"prompt {index} contains the padding id {pad} and has no mask: pass a TokenBatch or "
            "an attention mask ({'input_ids': ..., 'attention_mask': ...})"
        )


def _bos_id(tokenizer: PreTrainedTokenizerBase, *, required: bool) -> int | None:
    bos = tokenizer.bos_token_id
    if isinstance(bos, int):
        return bos
    if required:
        raise PromptError(
            "prepend_bos=True needs a BOS token and this tokenizer has none: leave prepend_bos out"
        )
    return None


def _front(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prepend_bos: bool | None
) -> tuple[int, ...]:
    """Return the ids that go in front of every text."""
    if prepend_bos is False:
        return ()
    if prepend_bos is True:
        return (cast(int, tokenizer.bos_token_id),)
    return leading_specials(tokenizer, texts)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, item: Prompt, index: int, tuning: Tuning | None
) -> str:
    try:
        return render(tokenizer, item, tuning=tuning).text
    except PromptError as error:
        raise PromptError(f"{_label(index, item.key)}: {error}") from error


def _warn_of_raw_text(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Prompt], tuning: Tuning | None
) -> None:
    if tuning is None or not tuning.instruct or tokenizer in _warned:
        return
    if any(item.ids is None and item.format == "raw" for item in items):
        _warned.add(tokenizer)
        warnings.warn(
            "raw text for an instruct model, which was tuned on its chat template: "
            "Prompt(text, format='chat') uses it (this is said once)",
            stacklevel=4,
        )


def _encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    label: str,
    front: tuple[int, ...],
    bos: int | None,
) -> _Encoded:
    if not text:
        raise PromptError(f"{label} is empty: give it a text")
    try:
        ids, offsets = encode_plain(tokenizer, text)
    except PromptError as error:
        raise PromptError(f"{label}: {error}") from error
    if not ids:
        raise PromptError(f"{label} has no tokens: {_short(text)} is nothing to this tokenizer")
    if front and bos is not None and ids[:2] == (bos, bos):
        raise PromptError(f"{label} starts with two BOS tokens: write it once, or not at all")
    if ids[0] in front:
        # The text spells its own BOS: keep that one.
        front = front[: front.index(ids[0])]
    spans = None if offsets is None else (None,) * len(front) + offsets
    return _Encoded(front + ids, spans)


def _take_ids(ids: tuple[int, ...], bos: int | None) -> _Encoded:
    return _Encoded(ids if bos is None or ids[:1] == (bos,) else (bos, *ids), None)


def _check_rows(
    rows: Sequence[Sequence[int]], keys: Sequence[str | None], max_length: int | None, size: int
) -> None:
    for index, (row, key) in enumerate(zip(rows, keys, strict=True)):
        label = _label(index, key)
        if not row:
            raise PromptError(f"{label} is empty: give it at least one token")
        if max_length is not None and len(row) > max_length:
            raise PromptError(
                f"{label} has {len(row)} tokens and the model's context holds {max_length}: "
                "shorten it"
            )
        wrong = next((id_ for id_ in row if not 0 <= id_ < size), None)
        if wrong is not None:
            raise PromptError(
                f"{label} has the id {wrong}, outside the vocabulary of {size}: was it made with "
                "another tokenizer?"
            )
