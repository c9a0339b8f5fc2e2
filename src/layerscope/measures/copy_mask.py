"""Which tokens the echo detectors do not count as content, shown rather than assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerscope.errors import TableError
from layerscope.measures.tokens import is_ignorable

SAMPLE = 16


def copy_mask(texts: Sequence[str | None]) -> dict[str, Any]:
    """Return the ids whose text is only white space, punctuation or control characters.

    `texts` holds the decoded text of every id from 0 on. Shows the first 16 texts, how many there
    are and which share of the vocabulary that is. Raises TableError for an empty vocabulary.
    """
    if not texts:
        raise TableError("the vocabulary holds no texts; give the text of every id")
    ids = [index for index, text in enumerate(texts) if is_ignorable(text)]
    return {
        "status": "ok",
        "ignored_token_ids": ids,
        "ignored_token_str_sample": [texts[index] for index in ids[:SAMPLE]],
        "size": len(ids),
        "share": len(ids) / len(texts),
        "d_vocab": len(texts),
    }
