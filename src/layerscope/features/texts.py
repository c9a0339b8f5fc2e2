"""Text as padded batches, one row per document, for training and checking dictionaries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from layerscope.errors import ConfigError
from layerscope.lenses.fitting.text import TextSource
from layerscope.models.batches import TokenBatch
from layerscope.models.language_model import LanguageModel

DEFAULT_CONTEXT = 256
_ROWS = 16


@dataclass(frozen=True, eq=False)
class TextBatches:
    """Batches to train on and batches held out; no document, nor a copy of it, is in both."""

    train: list[TokenBatch]
    held_out: list[TokenBatch]

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return sum(sum(batch.lengths) for batch in self.train)


def read_batches(
    model: LanguageModel,
    source: TextSource | str,
    *,
    tokens: int,
    held_out: int = 0,
    context: int | None = None,
) -> TextBatches:
    """Read documents, each cut at the context, until there are as many tokens as asked for.

    Args:
        model: whose tokenizer and context are used.
        source: a text file, JSON lines, Parquet, or a Hugging Face dataset.
        tokens, held_out: how many, at least.
        context: longest row; None for 256, or the model's if that is less.

    Raises:
        ConfigError: the text is too short, or cannot be read.
    """
    if not isinstance(source, TextSource):
        source = TextSource(source)
    limit = model.n_ctx or DEFAULT_CONTEXT
    longest = min(context or DEFAULT_CONTEXT, limit)
    wanted = {"train": tokens, "held_out": held_out}
    rows: dict[str, list[tuple[int, ...]]] = {name: [] for name in wanted}
    have = dict.fromkeys(wanted, 0)
    share = held_out / max(tokens + held_out, 1)
    for text in source.documents():
        digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
        part = "held_out" if int.from_bytes(digest[:8], "big") / 2**64 < 1.2 * share else "train"
        if have[part] >= wanted[part]:
            continue
        ids = _ids(model, text)[:longest]
        if len(ids) > 1:
            rows[part].append(ids)
            have[part] += len(ids)
        if all(have[name] >= wanted[name] for name in wanted):
            break
    for name, words in (("train", "to read"), ("held_out", "held out")):
        if have[name] < wanted[name]:
            raise ConfigError(
                f"{source.location} gives {have[name]:,} of {wanted[name]:,} tokens {words}; give "
                "more text, or ask for less"
            )
    return TextBatches(_batches(rows["train"]), _batches(rows["held_out"]))


def _ids(model: LanguageModel, text: str) -> tuple[int, ...]:
    found = model.tokenizer.encode(text, verbose=False)
    return tuple(int(each) for each in found)


def _batches(rows: list[tuple[int, ...]]) -> list[TokenBatch]:
    """Group rows of similar length, so that little padding is computed."""
    ordered: Sequence[tuple[int, ...]] = sorted(rows, key=len)
    return [
        TokenBatch.from_ids(ordered[first : first + _ROWS])
        for first in range(0, len(ordered), _ROWS)
    ]
